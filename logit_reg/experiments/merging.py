"""The results of slices, joined in a folder of their own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from logit_reg.evaluation.ledger import read_ledger, write_rows
from logit_reg.evaluation.slices import join_slices
from logit_reg.experiments.evaluations import (
    EXAMPLES_FILE,
    claim_output_dir,
    release_output_dir,
    shown_rows,
)
from logit_reg.files import read_arrays, write_arrays
from logit_reg.messages import UsageError

_MAX_EXAMPLE_BYTES = 64 * 2**20


def merge_slices(folders: Sequence[Path], output_dir: Path) -> dict:
    """Join the results of slices; writes `result.json`, `ledger.csv` and `examples.npz`.

    Args:
        folders: of the slices, see `logit_reg.evaluation.slices.join_slices`.
        output_dir: made if need be.

    Returns:
        The content of `result.json`.

    Raises:
        UsageError: if there are fewer than two folders, or `output_dir` holds something else.
        ValueError: if the slices do not fit together.
    """
    if len(folders) < 2:
        raise UsageError(
            f"--merge={folders[0]}: expected two folders of slices or more, joined by commas."
        )
    text, result = join_slices(folders)
    claim_output_dir(output_dir, result)
    _write_examples(folders, output_dir)
    write_rows(output_dir, text, result)
    release_output_dir(output_dir)
    return result


def _write_examples(folders, output_dir):
    """Those that one run would keep, out of what the slices kept."""
    if not all((folder / EXAMPLES_FILE).is_file() for folder in folders):
        return
    ledgers = sorted(
        ((read_ledger(folder)[0], folder) for folder in folders), key=lambda pair: pair[0].index[0]
    )
    shown = shown_rows(np.concatenate([ledger.label for ledger, _ in ledgers]))
    place: dict[int, dict[str, np.ndarray]] = {}
    for ledger, folder in ledgers:
        kept = read_arrays(folder / EXAMPLES_FILE, max_bytes=_MAX_EXAMPLE_BYTES)
        bounds = kept.pop("bounds")
        for i, row in enumerate(shown_rows(ledger.label)):
            place[int(ledger.index[row])] = {name: array[i] for name, array in kept.items()}
    found = [place[row] for row in shown if row in place]
    arrays = {name: np.stack([entry[name] for entry in found]) for name in found[0]}
    write_arrays(output_dir / EXAMPLES_FILE, arrays | {"bounds": bounds})
