"""The regularisers of the logits by name, and which settings each takes; needs no TensorFlow."""

from collections.abc import Mapping

MATRIX_NORMS = ("frobenius", "nuclear")
"""Norms of the (batch, classes) matrix of logits."""
CENTRES = ("zero", "clean")
"""What reg "squeeze" pulls the logits towards: 0, or those of the clean images."""

REGULARIZERS: Mapping[str, Mapping[str, float | str | None]] = {
    "none": {},
    "squeeze": {"beta": None, "matrix_norm": "frobenius", "centre": "zero"},
    "squeeze_example": {"beta": None},
    "similarity": {"beta": None, "gamma": 1.0, "matrix_norm": "frobenius"},
    "clip_xent": {"omega": 1.5},
    "clip_xent_batch": {"omega": 1.5},
    "pairing": {"beta": 0.5},
    "nuat": {"beta": 4.5},
    "gat": {"beta": 10.0},
    "trades": {"beta": 6.0},
    "alp": {"beta": 0.5},
}
"""By name, the settings of `objectives.Objective` that have an effect with it, each with the value
that it has in its publication, on CIFAR-10 where there are several; None where there is no usual
one, so that it has to be given."""

PAIRED = ("nuat", "gat", "trades", "alp")
"""Those that compare the logits of adversarial images with those of the clean ones."""

SETTINGS = tuple(dict.fromkeys(name for taken in REGULARIZERS.values() for name in taken))
"""All settings that depend on the regulariser."""


def taking(setting: str) -> tuple[str, ...]:
    """The regularisers that take a setting."""
    return tuple(name for name, settings in REGULARIZERS.items() if setting in settings)


def wants_clean_logits(reg: str, centre: str = "zero") -> bool:
    """Whether a regulariser needs the logits of the clean images beside those trained on."""
    return reg in PAIRED or (reg == "squeeze" and centre == "clean")
