"""Every reader of strangers' files, on 100 damaged ones each; CI takes 500, `make fuzz` 10,000."""

import os

import pytest
from fuzz.engine import fuzz
from fuzz.readers import READERS

INPUTS = int(os.environ.get("FUZZ_INPUTS", 100))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    report = fuzz(name, INPUTS, tmp_path, seed=1)
    assert not report.failures, "\n".join(report.failures)
    assert report.inputs == round(INPUTS * READERS[name].share)
    # Damage that the first check finds proves little.
    assert report.past_checks >= report.inputs / 2
    print(report)
