"""The regularisers of the logits by name, and which settings each takes; needs no TensorFlow."""

from collections.abc import Mapping

REGULARIZERS: Mapping[str, Mapping[str, float | None]] = {
    "none": {},
    "squeeze": {"beta": None},
    "squeeze_example": {"beta": None},
    "similarity": {"beta": None, "gamma": 1.0},
    "clip_xent": {"omega": 1.5},
    "clip_xent_batch": {"omega": 1.5},
    "pairing": {"beta": 0.5},
}
"""By name, the settings of `objectives.Objective` that have an effect with it, each with the value
that it has in its publication; None where there is no usual one, so that it has to be given."""

SETTINGS = tuple(dict.fromkeys(name for taken in REGULARIZERS.values() for name in taken))
"""All settings that depend on the regulariser."""


def taking(setting: str) -> tuple[str, ...]:
    """The regularisers that take a setting."""
    return tuple(name for name, settings in REGULARIZERS.items() if setting in settings)
