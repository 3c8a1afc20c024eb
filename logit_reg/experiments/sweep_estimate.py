"""How long the runs of a sweep take, from one timed gradient step of a network of their kind."""

import functools

import numpy as np

from logit_reg.attacks import PGD
from logit_reg.evaluation.run import estimate
from logit_reg.experiments.attack_choice import AttackChoice
from logit_reg.experiments.building import build_network
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.settings import RunSettings
from madry_compat.challenges import image_set

# A gradient costs about two forwards.
_FORWARDS_OF_GRADIENT = 2
# The full CIFAR network takes a second for as many.
_NUM_IMAGES = 8


def training_seconds(settings: RunSettings) -> float:
    """Of a training, on this machine."""
    forwards, backwards = settings.step_cost
    passes = forwards + _FORWARDS_OF_GRADIENT * backwards
    images = settings.max_num_training_steps * settings.training_batch_size
    return passes * images * _seconds_per_pass(settings.dataset, settings.width)


def evaluation_seconds(
    settings: RunSettings, choice: AttackChoice, num_examples: int | None
) -> float:
    """At most of an evaluation of a run, on this machine.

    Args:
        settings: of the run's training.
        choice: the attacks.
        num_examples: how many test images; None for all.
    """
    available = image_set(settings.dataset).num_test_examples
    count = min(num_examples or available, available)
    protocols = choice.on_challenge(settings.challenge)
    passes = sum(sum(attack.cost()) for named in protocols.values() for attack in named.values())
    return count * passes * _seconds_per_pass(settings.dataset, settings.width)


@functools.cache
def _seconds_per_pass(dataset: str, width: int) -> float:
    """Of one image forward through an untrained network of this kind."""
    given = {"dataset": dataset, "width": width} if width else {"dataset": dataset}
    settings = resolve_settings(given)
    shape = settings.challenge.image_shape
    images = np.random.default_rng(0).uniform(
        settings.threat.lower, settings.threat.upper, (_NUM_IMAGES, *shape)
    )
    probe = PGD(settings.threat, num_steps=1, step_size=settings.threat.epsilon)
    labels = np.zeros(_NUM_IMAGES, np.int64)
    network = build_network(settings)
    found = estimate(network, {"probe": probe}, images.astype(np.float32), labels)
    return found.seconds / (sum(probe.cost()) * _NUM_IMAGES)
