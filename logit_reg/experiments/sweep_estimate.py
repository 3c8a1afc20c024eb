"""How long a sweep takes, before it starts: a process of its own, which alone has TensorFlow.

Reads the flags of trainings, and of evaluations with those of the training before, as JSON from
its input; prints the seconds of all trainings and of all evaluations.
"""

import contextlib
import dataclasses
import functools
import io
import json
import sys
from typing import Any

import numpy as np

from logit_reg.attacks import PGD
from logit_reg.commands import command_line, eval_challenge
from logit_reg.commands.command_line import FLAGS
from logit_reg.commands.flag_groups import TRIAL_EXAMPLES
from logit_reg.evaluation.run import estimate_seconds
from logit_reg.experiments.building import build_network
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.settings import RunSettings, as_tuples

# A gradient costs about two forwards; a step of training is a forward and a gradient.
_PASSES_OF_STEP = 3
_TEST_IMAGES = {"mnist_5k": 1000}
# The full CIFAR network takes a second for as many.
_NUM_IMAGES = 8


def main() -> None:
    """Print the estimate as JSON: [seconds of training, seconds of evaluations at most]."""
    asked = json.load(sys.stdin)
    seconds = [0.0, 0.0]
    for training in asked["trainings"]:
        settings = _settings(training)
        seconds[0] += _training_passes(settings) * _seconds_per_pass(*_network_of(settings))
    for training, line in asked["evaluations"]:
        settings = _settings(training)
        seconds[1] += _evaluation_passes(settings, line) * _seconds_per_pass(*_network_of(settings))
    print(json.dumps(seconds))


def _settings(training: dict[str, Any]) -> RunSettings:
    names = {field.name for field in dataclasses.fields(RunSettings)}
    given = {name: as_tuples(value) for name, value in training.items() if name in names}
    # As many images, and as large ones, as those that a bare command takes instead.
    given["dataset"] = given.get("dataset") or "mnist"
    return resolve_settings(given, is_challenge_config=bool(training.get("config")))


def _network_of(settings: RunSettings) -> tuple[str, int]:
    return settings.dataset, settings.width


@functools.cache
def _seconds_per_pass(dataset: str, width: int) -> float:
    """Of one image forward through an untrained network of this kind, on this machine."""
    given = {"dataset": dataset, "width": width} if width else {"dataset": dataset}
    settings = resolve_settings(given)
    shape = settings.challenge.image_shape
    images = np.random.default_rng(0).uniform(
        settings.threat.lower, settings.threat.upper, (_NUM_IMAGES, *shape)
    )
    probe = PGD(settings.threat, num_steps=1, step_size=settings.threat.epsilon)
    labels = np.zeros(_NUM_IMAGES, np.int64)
    network = build_network(settings)
    seconds = estimate_seconds(network, {"probe": probe}, images.astype(np.float32), labels)
    return seconds / (sum(probe.cost()) * _NUM_IMAGES)


def _training_passes(settings: RunSettings) -> float:
    steps = 1 + (settings.num_steps if settings.adversary == "pgd" else 0)
    images = settings.max_num_training_steps * settings.training_batch_size
    return _PASSES_OF_STEP * steps * images


def _evaluation_passes(settings: RunSettings, line: list[str]) -> float:
    available = _TEST_IMAGES.get(settings.dataset, settings.challenge.num_test_examples)
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()
    FLAGS(["", *line])
    count = min(FLAGS.num_eval_examples or available, TRIAL_EXAMPLES if FLAGS.trial else available)
    with contextlib.redirect_stdout(io.StringIO()):
        protocols = eval_challenge.challenge_protocols(settings.challenge)
    costs = [sum(attack.cost()) for attacks in protocols.values() for attack in attacks.values()]
    return count * sum(costs)


if __name__ == "__main__":
    command_line.run(main, __doc__)
