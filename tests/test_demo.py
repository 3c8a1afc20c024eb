"""The demo: released networks first, their numbers counted anew, then what is trained."""

import shutil

import numpy as np
import pytest
from commands import ROOT
from test_report import save_run, save_strong

from logit_reg.experiments import demo
from logit_reg.files import read_arrays
from logit_reg.report.run_page import write_page
from logit_reg.report.runs import load_run


def test_the_images_beside_the_networks_are_the_first_of_the_test_set():
    arrays = read_arrays(demo.CHECKPOINTS / demo.IMAGES_FILE, max_bytes=2**20)
    assert arrays["images"].shape == (200, 28, 28, 1) and arrays["images"].dtype == np.uint8
    assert arrays["labels"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert demo.IMAGES_FILE in (ROOT / "THIRD_PARTY.md").read_text()


def test_the_page_begins_with_the_released_networks_and_counts_their_numbers(tmp_path):
    for name in ("released", "trained"):
        save_run(tmp_path / name, name)
        save_strong(tmp_path / name / "strong", 3, 10)
    released, trained = (load_run(tmp_path / name) for name in ("released", "trained"))

    write_page(tmp_path / "page.html", "Demo", [trained], released=[released])
    text = (tmp_path / "page.html").read_text()
    assert text.index("<h2>Released networks") < text.index("<h2>Results")
    assert "30.0 % of 10 images under the strong attack" in text

    write_page(tmp_path / "page.html", "Demo", [], released=[released])
    assert "<h2>Results" not in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_a_released_network_is_attacked_on_all_images_where_the_first_ones_fall(
    tmp_path, monkeypatch
):
    shutil.copytree(demo.CHECKPOINTS / "mnist-natural", tmp_path / "released/mnist-natural")
    arrays = read_arrays(demo.CHECKPOINTS / demo.IMAGES_FILE, max_bytes=2**20)
    few = {name: array[:4] for name, array in arrays.items()}
    np.savez_compressed(tmp_path / "released" / demo.IMAGES_FILE, **few)
    monkeypatch.setattr(demo, "_NUM_FIRST", 2)

    (run,) = demo.attack_released(tmp_path / "released", tmp_path / "out", show_progress=False)

    assert run.name == "natural"
    sizes = {kind: len(e.ledger.index) for kind, e in run.evaluations.items()}
    assert sizes == {"evaluation": 4, "strong": 4}
