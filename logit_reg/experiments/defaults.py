"""What a run's settings are where the user gives none: the paper's, then the challenge's."""

from collections.abc import Mapping
from typing import Any

from logit_reg.experiments.effects import TRAINING, check_effects
from logit_reg.experiments.settings import (
    DEFAULTS,
    PAPER_BATCH_SIZE,
    RunSettings,
    check_settings,
)
from logit_reg.regularizers import REGULARIZERS
from logit_reg.training.adversaries import (
    OF_CHALLENGES,
    adversary_class,
    comes_with_noise,
    reg_of,
)
from madry_compat.challenges import challenge_for, image_set


def resolve_settings(given: dict[str, Any], *, is_challenge_config: bool = False) -> RunSettings:
    """Fill in what was not given: the paper's settings, then the data set's challenge defaults.

    Args:
        given: fields of `RunSettings`; "dataset" is required.
        is_challenge_config: the rest comes from a challenge's config.json, so that everything
            not given is the challenge's own training: its adversary, batch size and loss.

    Returns:
        Settings without holes.

    Raises:
        ValueError: if settings contradict each other or are out of range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    challenge = challenge_for(given["dataset"])
    training, paper = challenge.training, challenge.paper
    adversary = given.get("adversary", OF_CHALLENGES if is_challenge_config else "none")
    reg = given.get("reg", reg_of(adversary))
    is_regularized = reg != "none" or given.get("smoothing", 0.0) > 0

    defaults: dict[str, Any] = {
        "width": paper.width,
        "epsilon": challenge.epsilon,
        "weight_decay": training.weight_decay,
        "momentum": training.momentum,
        "augment": training.augmentation,
        "num_output_steps": training.num_output_steps,
        "num_summary_steps": training.num_summary_steps,
        "num_checkpoint_steps": training.num_checkpoint_steps,
        "max_num_training_steps": training.max_num_training_steps,
        "step_size_schedule": training.step_size_schedule,
        "adversary": adversary,
        "reg": reg,
    }
    if is_challenge_config:
        defaults |= {
            "training_batch_size": training.training_batch_size,
            "loss_reduction": training.reduction,
            "first_example": image_set(given["dataset"]).validation_examples,
            "attack_batch_norm": "training",
        }
    else:
        defaults["training_batch_size"] = PAPER_BATCH_SIZE
        if is_regularized and adversary == "none":
            defaults["max_num_training_steps"] *= paper.stretch
            defaults["step_size_schedule"] = tuple(
                (step * paper.stretch, rate) for step, rate in training.step_size_schedule
            )
    if given.get("learning_rate_schedule", "steps") != "steps":
        defaults["step_size_schedule"] = defaults["step_size_schedule"][:1]
    if comes_with_noise(adversary, reg, given.get("centre", "zero"), given.get("smoothing", 0.0)):
        defaults["sigma"] = paper.sigma
    for name, usual in REGULARIZERS.get(reg, {}).items():
        if usual is not None:
            defaults[name] = usual
        elif name not in given:
            raise ValueError(
                f"--reg={reg} needs --{name}, the weight of its penalty (2 is the paper's choice "
                f"on MNIST; `squeeze` collapses from 10.73 on at batch {PAPER_BATCH_SIZE})."
            )
    method = adversary_class(adversary)
    length = method.usual_steps(challenge) or defaults["max_num_training_steps"]
    known = {"epsilon": challenge.epsilon, "reg": reg, "max_num_training_steps": length} | given
    defaults |= {"max_num_training_steps": length}
    defaults |= method.defaults(challenge, known, is_challenge_config=is_challenge_config)
    if not is_challenge_config:
        check_effects(TRAINING, given, given)
    settings = RunSettings(**(defaults | given))
    check_settings(settings)
    return settings


# Those that a recipe gives as shares of the training.
_COUNTED_IN_STEPS = ("ramp_steps", "beta_ramp_steps", "beta_schedule", "step_size_schedule")


def stretched_settings(run: RunSettings, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that is extended keeps, where a default would change with the number of steps.

    Args:
        run: as it was begun.
        given: settings that the user gives; None for the others.
    """
    names = [name for name in _COUNTED_IN_STEPS if given[name] is None]
    values = {name: getattr(run, name) for name in names}
    return {name: value for name, value in values.items() if value != DEFAULTS[name]}
