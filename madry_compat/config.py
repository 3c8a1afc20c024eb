"""The challenges' `config.json`, read in either spelling and written in the challenge's own.

The MNIST challenge says `k`, `a` and `random_seed` where the CIFAR-10 challenge says `num_steps`,
`step_size`, `tf_random_seed` and `np_random_seed`. Here everything has the CIFAR spelling, except
that the seed is `random_seed`.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from madry_compat.challenges import CIFAR10, Challenge
from madry_compat.files import write_atomically

_MAX_BYTES = 1_000_000


class ConfigError(ValueError):
    """A `config.json` that cannot be used; the message names the key, the value and the type."""


_Check = tuple[str, Callable[[Any], Any]]
"""What a setting must be, in words, and what returns it checked.

That raises ValueError, TypeError or OverflowError where the setting is something else.
"""


def _integer(least: int, most: int = 2**63 - 1) -> _Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError
        return value

    is_bounded = most < 2**63 - 1
    words = f"from {least} to 2**{most.bit_length()} - 1" if is_bounded else f"of at least {least}"
    return f"an integer {words}", check


def _non_negative_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not 0 <= float(value) < math.inf:
        raise ValueError
    return float(value)


def _path(value: Any) -> str:
    # Neither can be in the name of a file, nor can a lone surrogate, which isprintable refuses.
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError
    return value


def _choice(words: str, kind: type, *values: Any) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not kind or value not in values:
            raise ValueError
        return value

    return words, check


def checked_schedule(schedule: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    """A `step_size_schedule`, checked.

    Args:
        schedule: pairs [first step, learning rate]; the challenge writes int(step), so that
            40000.0 is a step, too.

    Raises:
        ValueError: if it is empty or malformed, does not start at step 0, has steps that do not
            increase, or a rate that is not positive and finite.
    """
    is_list = isinstance(schedule, Sequence)
    pairs = [tuple(pair) if isinstance(pair, Sequence) else (pair,) for pair in schedule]
    well_formed = all(
        len(pair) == 2 and _is_number(pair[1]) and _is_number(pair[0]) and int(pair[0]) == pair[0]
        for pair in pairs
    )
    if not is_list or not pairs or not well_formed or pairs[-1][0] >= 2**63:
        raise ValueError(
            f"step_size_schedule must list pairs [first step, learning rate]; got {schedule!r}."
        )
    steps = [int(step) for step, _ in pairs]
    rates = [float(rate) for _, rate in pairs]
    if steps[0] != 0 or any(later <= step for step, later in itertools.pairwise(steps)):
        raise ValueError(
            f"step_size_schedule must start at step 0 and increase; got steps {steps}."
        )
    if any(rate <= 0.0 for rate in rates):
        raise ValueError(f"step_size_schedule needs positive learning rates; got {rates}.")
    return tuple(zip(steps, rates, strict=True))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_POSITIVE, _WHOLE = _integer(1), _integer(0)
_NUMBER: _Check = ("a finite number of at least 0", _non_negative_number)
_BOOLEAN = _choice("true or false", bool, True, False)
_PATH: _Check = ("a path: a string of printable characters", _path)
_LOSS = _choice("'xent' or 'cw'", str, "xent", "cw")
_SCHEDULE: _Check = (
    "a list of [step, learning rate] pairs with steps ascending from 0",
    checked_schedule,
)


def _setting(check: _Check) -> Any:
    """A field for a key of the file, None where the file lacks it."""
    return field(default=None, metadata={"check": check})


@dataclass(frozen=True)
class ChallengeConfig:
    """What a `config.json` says, in pixel units; None for every key it lacks.

    Paths are as the file has them: whoever writes to them decides whether to trust the file.

    Attributes:
        challenge_name: "mnist" if the file has `k` or `a`, "cifar10" if it has another key that
            only the CIFAR-10 challenge has, None if neither.
        unknown: the keys that were not understood, without comments, in the file's order. In a
            file with `k` or `a` this includes a `step_size`: in the released MNIST models it is
            a learning rate.
        random_seed: `random_seed`, or the CIFAR-10 challenge's `tf_random_seed`.
        step_size_schedule: (first step, learning rate) pairs, ascending from step 0.
        epsilon: l-infinity bound in the challenge's pixel units.
        num_steps: attack steps (`k`).
        step_size: size of an attack step in pixel units (`a`).
    """

    challenge_name: str | None = None
    unknown: tuple[str, ...] = ()
    model_dir: str | None = _setting(_PATH)
    data_path: str | None = _setting(_PATH)
    random_seed: int | None = _setting(_WHOLE)
    np_random_seed: int | None = _setting(_integer(0, 2**32 - 1))
    max_num_training_steps: int | None = _setting(_POSITIVE)
    num_output_steps: int | None = _setting(_POSITIVE)
    num_summary_steps: int | None = _setting(_POSITIVE)
    num_checkpoint_steps: int | None = _setting(_POSITIVE)
    training_batch_size: int | None = _setting(_POSITIVE)
    step_size_schedule: tuple[tuple[int, float], ...] | None = _setting(_SCHEDULE)
    weight_decay: float | None = _setting(_NUMBER)
    momentum: float | None = _setting(_NUMBER)
    num_eval_examples: int | None = _setting(_POSITIVE)
    eval_batch_size: int | None = _setting(_POSITIVE)
    eval_on_cpu: bool | None = _setting(_BOOLEAN)
    epsilon: float | None = _setting(_NUMBER)
    num_steps: int | None = _setting(_WHOLE)
    step_size: float | None = _setting(_NUMBER)
    random_start: bool | None = _setting(_BOOLEAN)
    loss_func: str | None = _setting(_LOSS)
    store_adv_path: str | None = _setting(_PATH)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that the file has, in this spelling: what `write_config` takes."""
        values = {key: getattr(self, key) for key in _CHECKS}
        return {key: value for key, value in values.items() if value is not None}


# What each setting must be, by the names of `ChallengeConfig`.
_CHECKS: dict[str, _Check] = {
    entry.name: entry.metadata["check"] for entry in fields(ChallengeConfig) if entry.metadata
}
_SPELLED_DIFFERENTLY = {"num_steps", "step_size", "random_seed", "np_random_seed"}
_CIFAR_KEYS = {"num_steps", "step_size", "tf_random_seed", *CIFAR10.config_extras}
_ANY_SPELLING = {*_CHECKS, "k", "a", "tf_random_seed"}


def load_config(path: str | os.PathLike[str]) -> ChallengeConfig:
    """Read either challenge's `config.json`.

    Repeated comments, missing keys and extra keys are tolerated. A key that is repeated with
    another value is not: the challenge would silently take the last one, and a number measured
    with a setting that nobody chose is worse than no number.

    Args:
        path: a JSON file of at most 1 MB.

    Raises:
        ConfigError: if the file cannot be read as a JSON object, or a key it shares with the
            challenges has a value of the wrong type or range.

    Source:
        `config.json` and the scripts that read it, in both challenges.
    """
    path = Path(path)
    given = _collect(_parse(path), path.name)
    mnist_spelling = "k" in given or "a" in given
    spelling = _spelling(given, mnist_spelling)

    values = {}
    for key, value in given.items():
        if key in spelling:
            values[spelling[key]] = _check(spelling[key], value, f"{path.name}: {key}")
    unknown = tuple(
        _printable(key) for key in given if key not in spelling and not key.startswith("_")
    )
    challenge_name = None
    if mnist_spelling:
        challenge_name = "mnist"
    elif _CIFAR_KEYS & given.keys():
        challenge_name = "cifar10"
    return ChallengeConfig(challenge_name=challenge_name, unknown=unknown, **values)


def write_config(
    path: str | os.PathLike[str], challenge: Challenge, settings: Mapping[str, Any]
) -> None:
    """Write a `config.json` that the challenge's own scripts accept, whole or not at all.

    The scripts index the keys directly, so every key that one of them reads is there: from
    `settings` if given, else the challenge's default.

    Args:
        path: the file to write.
        challenge: decides the spelling, the keys and the defaults; CIFAR100's is CIFAR10's.
        settings: values by the names of `ChallengeConfig`, such as its `settings`. `model_dir`
            and `random_seed` have no default. None counts as not given. For MNIST,
            `data_path`, `step_size_schedule`, `weight_decay` and `momentum` are extra keys that
            its scripts ignore.

    Raises:
        ConfigError: if a setting is missing, unknown or has a value of the wrong type or range.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = sorted(set(given) - set(_CHECKS))
    missing = [key for key in ("model_dir", "random_seed") if key not in given]
    if unknown or missing:
        raise ConfigError(
            f"settings of a config.json: unknown {unknown}, missing {missing}. "
            f"Use the field names of ChallengeConfig."
        )
    checked = {key: _check(key, value, f"settings: {key}") for key, value in given.items()}
    values = {**_defaults(challenge), "np_random_seed": checked["random_seed"] % 2**32, **checked}
    if "np_random_seed" not in challenge.config_extras:
        values.pop("np_random_seed")
    written = {challenge.config_names.get(key, key): value for key, value in values.items()}
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _defaults(challenge: Challenge) -> dict[str, Any]:
    """The values of a challenge's keys that need no choice, in the order of its file."""
    training = challenge.training
    values: dict[str, Any] = {"model_dir": None}
    extras = challenge.config_extras
    if "data_path" in extras:
        values["data_path"] = extras["data_path"]
    values |= {
        "random_seed": None,
        "max_num_training_steps": training.max_num_training_steps,
        "num_output_steps": training.num_output_steps,
        "num_summary_steps": training.num_summary_steps,
        "num_checkpoint_steps": training.num_checkpoint_steps,
        "training_batch_size": training.training_batch_size,
    }
    for key in ("step_size_schedule", "weight_decay", "momentum"):
        if key in extras:
            values[key] = getattr(training, key)
    return values | {
        "num_eval_examples": challenge.num_test_examples,
        "eval_batch_size": challenge.eval_batch_size,
        "eval_on_cpu": challenge.eval_on_cpu,
        "epsilon": challenge.epsilon,
        "num_steps": training.attack.num_steps,
        "step_size": training.attack.step_size,
        "random_start": training.attack.random_start,
        "loss_func": training.attack.loss_func,
        "store_adv_path": "attack.npy",
    }


def _parse(path: Path) -> tuple[tuple[str, Any], ...]:
    """The (key, value) pairs of the file's object, repeated keys and all."""
    try:
        if not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise ConfigError(f"{path}: {state}, expected a config.json. Check the path.")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Check the file.") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"{path.name}: larger than {_MAX_BYTES} bytes, expected a config.json of a few "
            f"hundred. Check that it is the right file."
        )
    try:
        # Objects become tuples of pairs, so that a repeated key is seen; arrays stay lists.
        parsed = json.loads(data.decode("utf-8-sig"), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(
            f"{path.name}: not JSON ({reason}), expected an object of settings. Repair the file."
        ) from error
    if not isinstance(parsed, tuple):
        raise ConfigError(
            f"{path.name}: holds {_show(parsed)}, expected an object of settings, "
            f'such as {{"epsilon": 0.3}}. Check that it is the right file.'
        )
    return parsed


def _collect(pairs: tuple[tuple[str, Any], ...], name: str) -> dict[str, Any]:
    """The pairs as a dict; refuses a known key with two different values."""
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in _ANY_SPELLING and key in given and not _same(given[key], value):
            raise ConfigError(
                f"{name}: {key} is both {_show(given[key])} and {_show(value)}, expected one "
                f"value. Remove the wrong one."
            )
        given[key] = value
    return given


def _same(first: Any, second: Any) -> bool:
    try:
        return first == second
    except RecursionError:
        return False


def _spelling(given: Mapping[str, Any], mnist_spelling: bool) -> dict[str, str]:
    """From the keys understood in this file to the names of ChallengeConfig."""
    shared = {key: key for key in _CHECKS if key not in _SPELLED_DIFFERENTLY}
    if mnist_spelling:
        return shared | {"k": "num_steps", "a": "step_size", "random_seed": "random_seed"}
    seed = "tf_random_seed" if "tf_random_seed" in given else "random_seed"
    cifar = {key: key for key in ("num_steps", "step_size", "np_random_seed")}
    return shared | cifar | {seed: "random_seed"}


def _check(key: str, value: Any, where: str) -> Any:
    expected, convert = _CHECKS[key]
    try:
        return convert(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{where} is {_show(value)}, expected {expected}. Correct it or remove the key."
        ) from error


def _show(value: Any) -> str:
    """A value for a one-line message: as JSON where possible, cut where long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _printable(key: str) -> str:
    """A key for a notice: control characters escaped, cut where long."""
    text = key if key.isprintable() else ascii(key)
    return text if len(text) <= 60 else f"{text[:60]}..."
