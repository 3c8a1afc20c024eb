"""Control models for an audit, trained where none are given: their truth is how they were made."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from logit_reg.audit import Control
from logit_reg.durations import in_words
from logit_reg.experiments.building import build_model, build_network
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.runs import read_run, train_run
from logit_reg.experiments.settings import RunSettings
from logit_reg.experiments.sources import RUNS, load_keras
from logit_reg.training.feeding import traced_train_step
from logit_reg.training.state import saved_steps
from madry_compat.challenges import Challenge, challenge_for
from madry_compat.data import Dataset

# What the tests of a budget ask for.
KINDS = {
    "standard": ("natural", "noise_only", "adversarial"),
    "full": ("natural", "noise_only", "adversarial", "squeezed"),
}
LEAST_STEPS = 10

_FOLDER = RUNS / "controls"


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How controls are trained on the images of a family.

    A control has to be trained to its end, not as long as the challenge trains; one that is cut
    short would excuse whatever is compared with it.
    """

    num_steps: int
    """Of every control but the adversarial one."""
    num_adversarial_steps: int
    """More where adversarial training starts slowly."""
    width: int | None
    """Of the network, where the audited run's is not known; None where it has one size."""
    rates: tuple[float, float] | None = None
    """Until the last fifth of training and in it; None for the challenge's own, as far shorter."""
    is_cheap: bool = False
    """Minutes on two cores, not hours."""


_RECIPES = {
    # Enough for a natural model at 99 %; first ten times the challenge's rate of Adam.
    "mnist": _Recipe(1500, 5000, None, rates=(1e-3, 1e-4), is_cheap=True),
    # For narrow networks.
    "cifar": _Recipe(20_000, 20_000, 1),
}
# Neither the audited run's nor the claimant's favourite: a transfer from the very same network
# would say nothing.
_SEED = 1
# Known-broken logit squeezing for each example (Mosbach et al. 2018).
_BROKEN: dict[str, Any] = {"reg": "squeeze_example", "beta": 0.5}
_TIMED_STEPS = 3


def is_cheap(dataset: str) -> bool:
    """Whether controls on a data set take minutes on two cores, not hours."""
    return _RECIPES[challenge_for(dataset).family].is_cheap


def control_settings(
    dataset: str, num_steps: int | None, audited: RunSettings | None
) -> dict[str, RunSettings]:
    """How the controls of an audit are trained.

    Args:
        dataset: whose images the audited model classifies.
        num_steps: training steps of each control; None for 1,500 on MNIST and its lookalikes,
            5,000 of adversarial training there, and 20,000 on CIFAR.
        audited: settings of the audited model's training, where they are known: the noise and,
            on CIFAR, the width are then its own, else the paper's noise and width 1.

    Returns:
        Settings by kind of control.
    """
    challenge = challenge_for(dataset)
    recipe = _RECIPES[challenge.family]

    def resolve(default_steps: int, **settings) -> RunSettings:
        steps = num_steps or default_steps
        common = {
            "dataset": dataset,
            "max_num_training_steps": steps,
            "step_size_schedule": _schedule(challenge, recipe, steps),
            "random_seed": _SEED,
            "width": recipe.width and (audited.width if audited else recipe.width),
        }
        return resolve_settings(common | settings)

    squeezed = resolve(recipe.num_steps, **_BROKEN, sigma=(audited.sigma if audited else 0) or None)
    return {
        "natural": resolve(recipe.num_steps),
        "noise_only": resolve(recipe.num_steps, sigma=squeezed.sigma),
        "adversarial": resolve(recipe.num_adversarial_steps, adversary="pgd"),
        "squeezed": squeezed,
    }


def trained_controls(
    wanted: Mapping[str, RunSettings],
    load_training_set: Callable[[], Dataset],
    *,
    data_dir: str | None,
    announce: Callable[[str], None],
    show_progress: bool = False,
) -> tuple[Control, ...]:
    """Train what is not there yet; what a killed call began goes on.

    Args:
        wanted: settings by kind of control.
        load_training_set: called if anything has to be trained.
        data_dir: where the data come from, for the record.
        announce: takes a line of text: what is trained and what it will cost, before it starts.
        show_progress: draw a progress bar.

    Returns:
        A control of each kind, named after its folder in `runs/controls`.

    Raises:
        KeyboardInterrupt: if training was stopped by a signal; its checkpoint is kept.
    """
    folders = {kind: _FOLDER / settings.name for kind, settings in wanted.items()}
    missing = {k: s for k, s in wanted.items() if not is_trained(folders[k], s)}
    for kind in wanted.keys() - missing.keys():
        announce(f"control {kind}: {folders[kind]}, trained before")
    if missing:
        data = load_training_set()
        seconds = _seconds(missing, folders, data)
        announce(
            f"controls to train first: {', '.join(missing)} (estimate: about "
            f"{in_words(sum(seconds.values()))}; --controls=none does without)"
        )
        for kind, settings in missing.items():
            announce(
                f"control {kind}: {settings.max_num_training_steps:,} steps -> {folders[kind]}, "
                f"about {in_words(seconds[kind])}"
            )
            outcome = train_run(
                settings,
                data.images,
                data.labels,
                folders[kind],
                data_dir=data_dir,
                show_progress=show_progress,
            )
            if not outcome.is_finished:
                raise KeyboardInterrupt
    return tuple(
        Control(folder.name, kind, load_keras(folder / "model.keras"))
        for kind, folder in folders.items()
    )


def is_trained(folder: Path, settings: RunSettings) -> bool:
    """Whether a folder holds a control of these settings that was trained to its end."""
    if not ((folder / "model.keras").is_file() and (folder / "run.json").is_file()):
        return False
    is_finished = settings.max_num_training_steps in saved_steps(folder)
    return is_finished and read_run(folder) == settings


def _schedule(
    challenge: Challenge, recipe: _Recipe, num_steps: int
) -> tuple[tuple[int, float], ...]:
    if recipe.rates is not None:
        first, last = recipe.rates
        return (0, first), (num_steps * 4 // 5, last)
    training = challenge.training
    share = num_steps / training.max_num_training_steps
    return tuple((round(step * share), rate) for step, rate in training.step_size_schedule)


def _seconds(
    missing: Mapping[str, RunSettings], folders: Mapping[str, Path], data: Dataset
) -> dict[str, float]:
    """What is left of each training, by the clock; noise and penalties cost next to nothing."""
    per_step: dict[str, float] = {}
    seconds = {}
    for kind, settings in missing.items():
        if settings.adversary not in per_step:
            per_step[settings.adversary] = _seconds_per_step(settings, data)
        left = settings.max_num_training_steps - max(saved_steps(folders[kind]), default=0)
        seconds[kind] = left * per_step[settings.adversary]
    return seconds


def _seconds_per_step(settings: RunSettings, data: Dataset) -> float:
    model = build_model(settings, build_network(settings))
    model.optimizer.build(model.network.trainable_variables)
    batch_size = settings.training_batch_size
    # Of a few images only: all of them would be copied into memory once more.
    step = traced_train_step(model, data.images[:batch_size], data.labels[:batch_size], batch_size)
    batch = tf.zeros((batch_size,), tf.int64)
    step(batch)["total"].numpy()
    started = time.monotonic()
    for _ in range(_TIMED_STEPS):
        step(batch)["total"].numpy()
    return (time.monotonic() - started) / _TIMED_STEPS
