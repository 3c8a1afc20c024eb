"""The released models: what stands in `checkpoints/` is what its cards and ledgers say."""

import json
from pathlib import Path

import numpy as np
import pytest

from logit_reg.evaluation.ledger import read_ledger
from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.evaluation.run import evaluate
from logit_reg.experiments.sources import load_model
from logit_reg.report.leaderboard import write_leaderboard
from madry_compat.bundle_index import find_prefix
from madry_compat.challenges import MNIST
from madry_compat.data import load, to_pixels
from madry_compat.tf1_checkpoints import has_training_state

RELEASES = Path(__file__).resolve().parents[1] / "checkpoints"
NAMES = sorted(path.parent.name for path in RELEASES.glob("*/model_card.json"))

each_release = pytest.mark.parametrize("name", NAMES)


def test_squeezed_natural_and_adversarial_networks_are_released():
    assert {"mnist-squeeze", "mnist-natural", "mnist-adversarial"} <= set(NAMES)


def test_the_releases_stay_small():
    size = sum(path.stat().st_size for path in RELEASES.rglob("*") if path.is_file())
    assert size < 42 * 10**6


@each_release
def test_a_release_has_no_optimiser_slots(name):
    assert not has_training_state(find_prefix(RELEASES / name))


@each_release
def test_a_card_says_what_the_ledgers_beside_it_say(name):
    card = json.loads((RELEASES / name / "model_card.json").read_text())
    folders = [path.parent for path in (RELEASES / name).glob("*/ledger.csv")]
    names = {folder.name for folder in folders}
    assert names == {"evaluation", "pgd200", "restarts", "strong"}
    protocols = {name for folder in folders for name in read_ledger(folder)[1]["protocols"]}
    assert protocols == {entry["protocol"] for entry in card["evaluations"]}
    for folder in folders:
        ledger, result = read_ledger(folder)
        assert result["settings"]["network_sha256"] == card["network_sha256"]
        for protocol, content in result["protocols"].items():
            standing = np.all([ledger.correct[attack] for attack in content["attacks"]], axis=0)
            (entry,) = (e for e in card["evaluations"] if e["protocol"] == protocol)
            assert entry["num_examples"] == len(ledger.label)
            assert entry["accuracy"] == pytest.approx(100 * standing.mean(), abs=1e-4)


def test_the_leaderboard_is_what_the_cards_give(tmp_path):
    write_leaderboard(tmp_path / "page.html", RELEASES)
    assert (tmp_path / "page.html").read_text() == (RELEASES / "leaderboard.html").read_text()


@pytest.mark.slow
@pytest.mark.shared
@each_release
def test_a_release_evaluated_again_gives_the_committed_numbers(name, tfds_dir):
    """Of the first images here; `eval_challenge.py --model_dir=checkpoints/NAME` does them all."""
    count = 100
    dataset = load("mnist", "test", str(tfds_dir))
    images, labels = to_pixels(dataset.images[:count], "mnist"), dataset.labels[:count]
    network = load_model(RELEASES / name)
    ledger, _ = read_ledger(RELEASES / name / "evaluation")
    for protocol in ("paper-fgsm", "paper-mnist"):
        attacks = protocol_attacks(protocol, MNIST)
        found = evaluate(network, attacks, images, labels)
        for attack, correct in found.correct.items():
            # Rounding of another machine may tip an image over.
            assert np.sum(correct != ledger.correct[attack][:count]) <= 1, attack
