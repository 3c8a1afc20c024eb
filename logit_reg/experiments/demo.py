"""The demo: what attacks leave of the released networks, then the defences trained from scratch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.evaluation.protocols import protocol_attacks
from logit_reg.evaluation.run import network_hash
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.evaluations import NAME_DIGITS, TestImages, evaluate_protocols
from logit_reg.experiments.runs import train_run
from logit_reg.experiments.sources import load_keras, load_model, load_split
from logit_reg.files import read_arrays, read_json, write_text
from logit_reg.messages import notice
from logit_reg.report.run_page import write_page
from logit_reg.report.runs import Run, load_run
from logit_reg.report.tables import results_table
from madry_compat.challenges import EMBEDDED, MNIST, challenge_for
from madry_compat.data import load, to_pixels

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
"""The released networks of a clone."""
IMAGES_FILE = "mnist-test-200.npz"
"""Beside them: the first 200 images of MNIST's test set, uint8, and their labels."""

_MAX_IMAGE_BYTES = 2**24
_TITLE = "Cheap defences: what PGD promises and what AutoAttack leaves"
_WEAK_PROTOCOLS = ("paper-fgsm", "paper-mnist")
_BATCH_SIZE = 200
# AutoAttack takes seconds for each image that it cannot break: a network of which more than a
# tenth of so many images stands is not attacked on more.
_NUM_FIRST = 12
_FEW = 0.1

# A higher rate than the challenge's 1e-4: near 97 % clean on 4,000 digits within half a minute.
_COMMON: dict[str, Any] = {
    "dataset": EMBEDDED,
    "max_num_training_steps": 400,
    "training_batch_size": 64,
    "step_size_schedule": ((0, 1e-3),),
    "num_output_steps": 20,
    "num_checkpoint_steps": 100,
}
_RUNS: dict[str, dict[str, Any]] = {
    "natural": {},
    "noise-only": {"sigma": 0.5},
    "squeeze": {"reg": "squeeze", "beta": 2.0},
    "similarity": {"reg": "similarity", "beta": 2.0},
    "smoothing": {"smoothing": 0.75},
    # Many small steps, most of them below the full epsilon: otherwise so short a run learns
    # nothing, and the demo would flatter its rivals.
    "adversarial": {
        "adversary": "pgd",
        "training_batch_size": 32,
        "max_num_training_steps": 1000,
        "ramp_steps": 350,
        "step_size_schedule": ((0, 1e-3), (850, 3e-4)),
    },
}
_NUM_EXAMPLES = 500
_NUM_STRONG_EXAMPLES = 100


def run_demo(
    demo_dir: Path, *, checkpoints: Path = CHECKPOINTS, show_progress: bool = True
) -> None:
    """Attack the released networks, then train six and attack them; tables and a page.

    Interrupted, the same call goes on where it was.

    Args:
        demo_dir: gets runs, evaluations and `index.html`, which is there after the first part.
        checkpoints: the released networks; without them the second part is all there is.
        show_progress: draw progress bars.
    """
    page = demo_dir / "index.html"
    released: list[Run] = []
    if (checkpoints / IMAGES_FILE).is_file():
        released = attack_released(checkpoints, demo_dir / "released", show_progress=show_progress)
        write_page(page, _TITLE, [], released=released)
        print(f"\n{results_table(released).to_text()}\n\npage: {page.resolve().as_uri()}\n")
    else:
        notice(f"{checkpoints}: no released networks there; a clone of the project has them.")
    runs = train_and_attack(demo_dir, show_progress=show_progress)
    write_page(page, _TITLE, runs, released=released)
    print(f"\n{results_table(runs).to_text()}\n\npage: {page.resolve().as_uri()}")


def attack_released(checkpoints: Path, folder: Path, *, show_progress: bool = True) -> list[Run]:
    """Attack released networks on the images beside them: FGSM, PGD-40 and AutoAttack.

    Args:
        checkpoints: folders of networks with a `model_card.json`, and `mnist-test-200.npz`.
        folder: gets a folder for each network, named by its content: another one is attacked anew.
        show_progress: draw progress bars.

    Returns:
        Their evaluations, by what the cards say of AutoAttack: the weakest network first.

    Raises:
        ValueError: if a network, a card or the images cannot be read.
    """
    arrays = read_arrays(
        checkpoints / IMAGES_FILE, names=("images", "labels"), max_bytes=_MAX_IMAGE_BYTES
    )
    pixels, labels = to_pixels(arrays["images"], MNIST.name), arrays["labels"].astype(np.int64)
    test = TestImages(MNIST.name, pixels, labels, (MNIST.lower, MNIST.upper))
    cards = [(read_json(path), path.parent) for path in checkpoints.glob("*/model_card.json")]
    cards = [(card, path) for card, path in cards if card.get("dataset") == MNIST.name]
    cards.sort(key=lambda pair: (*_known(pair[0]), pair[1].name))
    runs = []
    for number, (_, path) in enumerate(cards, start=1):
        print(f"[{number}/{len(cards)}] released network {path.name}", flush=True)
        network = load_model(path)
        name = path.name.removeprefix(f"{MNIST.name}-")
        place = folder / f"{name}-{network_hash(network)[:NAME_DIGITS]}"
        runs.append(_attack_one(network, path, test, place, name, show_progress))
    return runs


def train_and_attack(demo_dir: Path, *, show_progress: bool = True) -> list[Run]:
    """Train the paper's defences and the baselines on 5,000 embedded digits, and attack them.

    Args:
        demo_dir: gets a folder for each run.
        show_progress: draw progress bars.
    """
    training_set = load_split(EMBEDDED, "train", None, download=False, is_chosen=False)
    test_set = load(EMBEDDED, "test")
    pixels = to_pixels(test_set.images, EMBEDDED)
    challenge = challenge_for(EMBEDDED)
    test = TestImages(EMBEDDED, pixels, test_set.labels, (challenge.lower, challenge.upper))
    for number, (name, given) in enumerate(_RUNS.items(), start=1):
        settings = resolve_settings(_COMMON | given)
        folder = demo_dir / name
        print(f"[{number}/{len(_RUNS)}] {settings.description}", flush=True)
        outcome = train_run(
            settings,
            training_set.images,
            training_set.labels,
            folder,
            show_progress=show_progress,
        )
        if not outcome.is_finished:
            raise KeyboardInterrupt
        network = load_keras(folder / "model.keras")
        provenance = {"model": str(folder), "canonical": False, "contaminated": False}
        for kind, protocols, count in (
            ("evaluation", _WEAK_PROTOCOLS, _NUM_EXAMPLES),
            ("strong", ("autoattack",), _NUM_STRONG_EXAMPLES),
        ):
            images = test.first(count)
            _evaluate(network, images, protocols, folder / kind, provenance, show_progress)
    write_text(demo_dir / "order.txt", "\n".join(_RUNS) + "\n")
    return [load_run(demo_dir / name) for name in _RUNS]


def _known(card: dict) -> Sequence[float]:
    """What a card says of AutoAttack and of weaker attacks; what it does not say comes last."""
    found = (card.get("autoattack_acc"), card.get("reported"))
    return [value if isinstance(value, int | float) else np.inf for value in found]


def _attack_one(network, path, test, folder, name, show_progress) -> Run:
    provenance = {"model": str(path), "canonical": True, "contaminated": False}

    def attack(kind, protocols, images):
        place = folder / kind
        return _evaluate(network, images, protocols, place, provenance, show_progress)

    attack("evaluation", _WEAK_PROTOCOLS, test)
    strong = "strong-first"
    first = attack(strong, ("autoattack",), test.first(_NUM_FIRST))
    if first["robust_accuracy"] <= _FEW and len(test.images) > _NUM_FIRST:
        strong = "strong"
        attack(strong, ("autoattack",), test)
    run = load_run(folder)
    shown = {kind: run.evaluations[kind] for kind in ("evaluation", strong)}
    return dataclasses.replace(run, name=name, evaluations=shown)


def _evaluate(
    network: keras.Model,
    test: TestImages,
    protocols: Sequence[str],
    folder: Path,
    provenance: dict[str, Any],
    show_progress: bool,
) -> dict:
    """Evaluate unless that is done; the content of `result.json`."""
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    challenge = challenge_for(test.dataset)
    _, result = evaluate_protocols(
        network,
        test,
        {name: protocol_attacks(name, challenge) for name in protocols},
        folder,
        batch_size=_BATCH_SIZE,
        seed=0,
        settings=provenance,
        show_progress=show_progress,
    )
    return result
