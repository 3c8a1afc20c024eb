"""How a run is called: its method in a few words, and the name of its folder."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

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
    "free_gradient",
)


def describe(values: Mapping[str, Any], adversary: str, *, is_whole_method: bool) -> str:
    """The method of a run in a few words, such as "squeeze beta=2 + noise".

    Args:
        values: the settings of the run by name, see `RunSettings`.
        adversary: what its adversary is called; "" for none.
        is_whole_method: whether that names the regulariser as well.
    """
    words = []
    if is_whole_method:
        words.append(adversary)
    elif values["reg"] != "none":
        words.append(values["reg"])
    if values["matrix_norm"] != "frobenius":
        words.append(values["matrix_norm"])
    if values["centre"] != "zero":
        words.append(f"centre={values['centre']}")
    for name in ("beta", "gamma", "omega"):
        if values[name] and not (name == "gamma" and values["gamma"] == 1.0):
            words.append(f"{name}={values[name]:g}")
    if values["smoothing"]:
        words.append(f"label smoothing {values['smoothing']:g}")
    if adversary and not is_whole_method:
        words.append(adversary)
    if values["sigma"]:
        words.append("+ noise" if words else "noise only")
    if values["ema"]:
        words = [*(words or ["natural"]), "+ ema"]
    return " ".join(words) or "natural"


def run_name(values: Mapping[str, Any], description: str, defaults: Mapping[str, Any]) -> str:
    """The name of a run's folder, which differs wherever the settings do.

    Args:
        values: the settings of the run by name.
        description: of `describe`.
        defaults: values of its fields where a run of an earlier version has none.
    """
    words = [values["dataset"], *description.replace("+ ", "").replace("=", "").split()]
    # --extend raises the number of steps of the same run.
    left_out = {"max_num_training_steps"}
    left_out |= {name for name in _LATER_SETTINGS if values[name] == defaults[name]}
    hashed = {name: value for name, value in values.items() if name not in left_out}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    if values["width"]:
        words.append(f"width{values['width']}")
    if values["sigma"]:
        words.append(f"sigma{values['sigma']:g}")
    words += [
        f"{values['max_num_training_steps']}steps",
        f"seed{values['random_seed']}",
        digest[:6],
    ]
    return "-".join(words)
