"""Signs that a robustness evaluation cannot be trusted, as AutoAttack looks for them."""

import dataclasses
import warnings
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

# Largest l2 distance of an image's normalised logits between two passes.
_SAME_LOGITS = 1e-4
# How near to probabilities outputs are that count as such.
_PROBABILITY_SLACK = 1e-5
# Share of examples that Square may take from gradient attacks.
_SQUARE_SHARE = 0.002


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something about a network that makes an attack unreliable or incomplete."""

    name: str
    """"randomised", "dynamic", "zero_gradients", "square_lowers", "num_targets" or
    "num_classes"."""
    message: str
    """One line: what was seen, what it may mean and what to do."""
    value: float
    """The number behind it."""


class AttackWarning(UserWarning):
    """A warning that carries its `Finding`."""

    def __init__(self, finding: Finding):
        """Carry a finding."""
        # As the only argument, so that the warning can be pickled and made again.
        super().__init__(finding)

    @property
    def finding(self) -> Finding:
        """What was found."""
        return self.args[0]

    def __str__(self) -> str:
        """The message of the finding."""
        return self.finding.message


def warn(findings: Iterable[Finding]) -> None:
    """Issue an `AttackWarning` for each finding."""
    for finding in findings:
        warnings.warn(AttackWarning(finding), stacklevel=3)


def refuse_probabilities(outputs: np.ndarray) -> None:
    """Refuse a network that ends in a softmax.

    Args:
        outputs: (N, K) what it returns.

    Raises:
        ValueError: if every row is a probability distribution.
    """
    slack = _PROBABILITY_SLACK
    in_range = outputs.min(initial=0) > -slack and outputs.max(initial=0) < 1 + slack
    if len(outputs) and in_range and np.all(np.abs(outputs.sum(axis=1) - 1) < slack):
        raise ValueError(
            "logits_fn returns probabilities (all in [0, 1], each row sums to 1), expected "
            "logits: pass the network without its softmax, or the logarithm of its output."
        )


def check_randomised(passes: list[np.ndarray], labels: np.ndarray) -> list[Finding]:
    """Compare several passes of the same images.

    Args:
        passes: (N, K) logits of each pass.
        labels: (N,) int.

    Returns:
        A finding if the accuracy differs, or an image's normalised logits do by more than 1e-4.
    """
    accuracies = {float(np.mean(logits.argmax(axis=1) == labels)) for logits in passes}
    lengths = [np.linalg.norm(logits, axis=1, keepdims=True) for logits in passes]
    unit = [p / np.where(length > 0, length, 1) for p, length in zip(passes, lengths, strict=True)]
    spread = max(
        float(np.linalg.norm(a - b, axis=1).max(initial=0))
        for i, a in enumerate(unit)
        for b in unit[i + 1 :]
    )
    if len(accuracies) == 1 and spread <= _SAME_LOGITS:
        return []
    return [
        Finding(
            "randomised",
            "the network seems to be randomised: its logits differ between passes of the same "
            'images; use AutoAttack(version="rand").',
            spread,
        )
    ]


def check_dynamic(graph: tf.Graph) -> list[Finding]:
    """Whether a network takes gradients itself, as defences do that adapt to their input.

    Args:
        graph: of the network's forward pass.

    Returns:
        A finding if there are operations of a `tf.GradientTape` in it, at any depth.
    """
    definition = graph.as_graph_def()
    names = [node.name for node in definition.node]
    for function in definition.library.function:
        names += [node.name for node in function.node_def]
    num_operations = sum(name.startswith("gradient_tape/") for name in names)
    if not num_operations:
        return []
    return [
        Finding(
            "dynamic",
            "the network takes gradients in its forward pass, which makes it a dynamic defence: "
            "fixed attacks may overstate its robustness; use one that knows the defence.",
            num_operations,
        )
    ]


def check_zero_gradients(gradients: np.ndarray) -> list[Finding]:
    """Count the images whose gradient vanishes.

    Args:
        gradients: (N, H, W, C) float.

    Returns:
        A finding if there is one.
    """
    num_zero = int(np.sum(~np.any(gradients.reshape(len(gradients), -1), axis=1)))
    if not num_zero:
        return []
    return [
        Finding(
            "zero_gradients",
            f"the gradient vanishes for {num_zero} of {len(gradients)} images: attacks that "
            "follow gradients may overstate the robustness.",
            num_zero,
        )
    ]


def check_square(before: np.ndarray, stages: Iterable[tuple[str, np.ndarray]]) -> list[Finding]:
    """Whether the attack without gradients breaks what those before it leave.

    Args:
        before: (N,) bool standing before the first stage.
        stages: (name, (N,) bool standing after it) of a cascade, in order.

    Returns:
        A finding if the stage "square" breaks more than 0.2 % of the N examples.
    """
    for name, after in stages:
        share = float(np.sum(before & ~after)) / max(len(before), 1)
        if name == "square" and share > _SQUARE_SHARE:
            return [
                Finding(
                    "square_lowers",
                    f"Square breaks {100 * share:.1f} points that the attacks with gradients "
                    "leave standing: these may be misled; run Square with more queries, or an "
                    "adaptive attack.",
                    share,
                )
            ]
        before = after
    return []
