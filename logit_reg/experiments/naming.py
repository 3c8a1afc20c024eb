"""How a run is called: its method in a few words, and the name of its folder."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logit_reg.experiments.settings import RunSettings

# Settings of later versions; where they have their defaults, runs keep the names they had before.
_LATER_SETTINGS = (
    "train_dtype",
    "max_to_keep",
    "matrix_norm",
    "centre",
    "beta_schedule",
    "beta_ramp_steps",
    "start_noise",
    "learning_rate_schedule",
    "ema",
    "ema_momentum",
    "num_robustness_steps",
    "stop_on_overfitting",
)


def describe(settings: "RunSettings") -> str:
    """The method of a run in a few words, such as "squeeze beta=2 + noise"."""
    words = []
    if settings.reg != "none":
        words.append(settings.reg)
    if settings.matrix_norm != "frobenius":
        words.append(settings.matrix_norm)
    if settings.centre != "zero":
        words.append(f"centre={settings.centre}")
    for name in ("beta", "gamma", "omega"):
        if getattr(settings, name) and not (name == "gamma" and settings.gamma == 1.0):
            words.append(f"{name}={getattr(settings, name):g}")
    if settings.smoothing:
        words.append(f"label smoothing {settings.smoothing:g}")
    adversary = settings.training_adversary.description
    # A method and its own pair term have one name.
    if adversary and adversary.lower() != settings.reg:
        words.append(adversary)
    if settings.sigma:
        words.append("+ noise" if words else "noise only")
    if settings.ema:
        words = [*(words or ["natural"]), "+ ema"]
    return " ".join(words) or "natural"


def run_name(settings: "RunSettings", defaults: Mapping[str, Any]) -> str:
    """The name of a run's folder, which differs wherever the settings do.

    Args:
        settings: of the run.
        defaults: values of its fields where a run of an earlier version has none.
    """
    words = [settings.dataset, *describe(settings).replace("+ ", "").replace("=", "").split()]
    values = dataclasses.asdict(settings)
    # --extend raises the number of steps of the same run.
    values.pop("max_num_training_steps")
    for name in _LATER_SETTINGS:
        if values[name] == defaults[name]:
            values.pop(name)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if settings.width:
        words.append(f"width{settings.width}")
    if settings.sigma:
        words.append(f"sigma{settings.sigma:g}")
    words += [
        f"{settings.max_num_training_steps}steps",
        f"seed{settings.random_seed}",
        digest[:6],
    ]
    return "-".join(words)
