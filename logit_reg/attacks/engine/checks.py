"""Signs that a robustness evaluation cannot be trusted, as AutoAttack checks for them."""

import dataclasses
import functools
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.attack import Cascade
from logit_reg.attacks.engine.examples import attack_inputs
from logit_reg.attacks.engine.forward import (
    LogitsFn,
    batch_spec,
    clean_logits,
    compiled,
    forward_graph,
)
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import LOSSES, attack_loss, is_finite, margin
from logit_reg.attacks.engine.low_precision import exact_gradient_fn
from logit_reg.attacks.engine.random_numbers import random_direction, random_stream
from logit_reg.messages import Finding
from logit_reg.threat import ThreatModel

SAME_LOGITS = 1e-4
"""Largest l2 distance of an image's normalised logits between two passes."""
# How near to 1 sums are that count as those of probabilities; in half precision they are further.
_PROBABILITY_SLACK = 1e-5
_HALF_SLACK = ((tf.bfloat16.as_numpy_dtype, 2.0**-6), (np.float16, 2.0**-9))
# The smallest probability that is told from 0, so that its logarithm is finite.
_LEAST_PROBABILITY = 1e-37
# How near to probabilities up to scale and offset outputs have to be, of their range.
_SCALED_SLACK = 1e-3
_SURE = 0.99
NUM_CHECKED = 100
"""Images that `check_network` sends through the network."""
_NUM_PASSES = 5
# Share of examples that Square may take from gradient attacks.
_SQUARE_SHARE = 0.002


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


@dataclasses.dataclass(frozen=True)
class Probabilities:
    """Outputs that are `scale` times probabilities plus `offset`."""

    scale: float = 1.0
    offset: float = 0.0

    def logarithm(self, outputs):
        """Logits that these outputs may come from: (N, K) -> (N, K) tensor."""
        return tf.math.log(tf.maximum((outputs - self.offset) / self.scale, _LEAST_PROBABILITY))


def probabilities(outputs: np.ndarray) -> Probabilities | None:
    """How outputs are made of probabilities, or None where they are logits.

    Probabilities that are scaled and shifted are told by rows which all have the same sum and by
    an image of which the network is sure: the one large output is then as far above the smallest
    as the sum allows. Two logits of opposite sign would look the same, so that there only plain
    probabilities count.

    Args:
        outputs: (N, K) float.
    """
    if not len(outputs) or not np.isfinite(outputs).all():
        return None
    wide = outputs.astype(np.float64)
    sums, num_classes = wide.sum(axis=1), wide.shape[1]
    slack = _slack(outputs)
    is_in_range = wide.min() > -slack and wide.max() < 1 + slack
    if is_in_range and np.all(np.abs(sums - 1) < slack):
        return Probabilities()
    offset, span = float(wide.min()), float(np.ptp(wide))
    scale = float(sums.mean()) - num_classes * offset
    is_constant = np.ptp(sums) <= _SCALED_SLACK * span
    is_sure = _SURE * scale <= span <= (1 + _SCALED_SLACK) * scale
    if num_classes < 3 or span == 0 or not (is_constant and is_sure):
        return None
    return Probabilities(scale, offset)


def _slack(outputs: np.ndarray) -> float:
    """How far from 1 the sums of probabilities may be, by the precision that the outputs show."""
    for dtype, slack in _HALF_SLACK:
        if np.array_equal(outputs, outputs.astype(dtype).astype(outputs.dtype)):
            return slack
    return _PROBABILITY_SLACK


def check_outputs(outputs: np.ndarray) -> list[Finding]:
    """Whether a network returns something else than logits.

    Args:
        outputs: (N, K) what it returns.

    Returns:
        A finding if each row is a probability distribution, up to scale and offset; another one
        if each is a one-hot decision.
    """
    if probabilities(outputs) is None:
        return []
    num_values = len(np.unique(outputs))
    if num_values == 2:
        return [
            Finding(
                "decisions",
                "the network returns one-hot decisions, expected logits: attacks that follow "
                "gradients find none; pass the network without its last step.",
                num_values,
            )
        ]
    return [
        Finding(
            "probabilities",
            "the network returns probabilities, expected logits: attacks may overstate its "
            "robustness; pass the network without its softmax, or the logarithm of its output.",
            float(outputs.max()),
        )
    ]


def check_finite(not_finite: np.ndarray) -> list[Finding]:
    """Count the images for which the network breaks down.

    Args:
        not_finite: (N,) bool.

    Returns:
        A finding if there is one.
    """
    num_broken = int(np.sum(not_finite))
    if not num_broken:
        return []
    return [
        Finding(
            "not_finite",
            f"the network's logits are not finite for {num_broken} of {len(not_finite)} images, "
            "which count as wrong: look for weights that are not numbers, for an overflow, or for "
            "classes masked with -inf, where a large negative number does.",
            num_broken,
        )
    ]


def check_randomised(
    passes: list[np.ndarray],
    labels: np.ndarray,
    *,
    for_randomised: bool = False,
    traced_anew: np.ndarray | None = None,
) -> list[Finding]:
    """Compare several passes of the same images.

    Two passes differ if the accuracy does, or an image's normalised logits do by more than 1e-4.

    Args:
        passes: (N, K) logits of each pass.
        labels: (N,) int.
        for_randomised: the attacks are made for a network that is randomised.
        traced_anew: (N, K) logits of a further pass, by another trace of the network.

    Returns:
        A finding if passes differ and the attacks are not made for that, or the other way round;
        another one if they are the same, and the one that is traced anew differs.
    """
    spread = _spread(passes, labels)
    if spread is not None and for_randomised:
        return []
    if spread is not None:
        return [
            Finding(
                "randomised",
                "the network seems to be randomised: its logits differ between passes of the same "
                "images; average over passes with --eot=20, evaluate(..., eot=20) in Python, or "
                "take --protocol=autoattack-rand.",
                spread,
            )
        ]
    frozen = None if traced_anew is None else _spread([*passes[:1], traced_anew], labels)
    if frozen is not None:
        return [
            Finding(
                "frozen",
                "the network's logits differ only when it is traced anew: random numbers of numpy "
                "or Python are drawn once and stay; draw them with tf.random or in a layer, so "
                "that every pass has its own.",
                frozen,
            )
        ]
    if not for_randomised:
        return []
    return [
        Finding(
            "not_randomised",
            "the network gives the same logits in every pass: averaging over passes changes "
            "nothing and takes its time; random layers of Keras, as Dropout, are off in "
            "evaluation unless they are called with training=True.",
            0.0,
        )
    ]


def _spread(passes: list[np.ndarray], labels: np.ndarray) -> float | None:
    """Largest l2 distance of an image's normalised logits; None if the passes are the same."""
    # Logits that are not finite are another finding.
    passes = [np.where(np.isfinite(p).all(axis=1, keepdims=True), p, 0) for p in passes]
    accuracies = {float(np.mean(logits.argmax(axis=1) == labels)) for logits in passes}
    lengths = [np.linalg.norm(logits, axis=1, keepdims=True) for logits in passes]
    unit = [p / np.where(length > 0, length, 1) for p, length in zip(passes, lengths, strict=True)]
    spread = max(
        float(np.linalg.norm(a - b, axis=1).max(initial=0))
        for i, a in enumerate(unit)
        for b in unit[i + 1 :]
    )
    return None if len(accuracies) == 1 and spread <= SAME_LOGITS else spread


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


def check_zero_gradients(
    zero: Mapping[str, np.ndarray], followed: Collection[str] = ()
) -> list[Finding]:
    """Count the images whose gradient vanishes.

    Args:
        zero: (N,) bool for each loss.
        followed: the losses that matter; all if empty.

    Returns:
        A finding if there is one; its value is the largest number for any of these losses.
    """
    counts = {loss: int(np.sum(flags)) for loss, flags in zero.items()}
    vanishing = {
        loss: count for loss, count in counts.items() if count and loss in (followed or counts)
    }
    if not vanishing:
        return []
    num_images = len(next(iter(zero.values())))
    shown = ", ".join(
        f"{count} of {num_images} images ({loss})" for loss, count in vanishing.items()
    )
    others = " or ".join(loss for loss, count in counts.items() if not count)
    instead = f"the loss {others}, whose gradient does not vanish," if others else "Square"
    return [
        Finding(
            "zero_gradients",
            f"the gradient vanishes for {shown}: attacks that follow it may overstate the "
            f"robustness; compare with {instead} or --protocol=autoattack.",
            max(vanishing.values()),
        )
    ]


def check_square(before: np.ndarray, stages: Iterable[tuple[str, np.ndarray]]) -> list[Finding]:
    """Whether the attack without gradients breaks what those before it leave.

    Args:
        before: (N,) bool robust before the first stage.
        stages: (name, (N,) bool still robust after it) of a cascade, in order.

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
                    "leave robust: these may be misled; run Square with more queries, or an "
                    "adaptive attack.",
                    share,
                )
            ]
        before = after
    return []


def check_network(
    logits_fn: LogitsFn,
    threat: ThreatModel,
    images,
    labels,
    *,
    followed: Collection[str] = (),
    for_randomised: bool = False,
    seed: int = 0,
    indices=None,
    batch_size: int = NUM_CHECKED,
    gradient_logits_fn: LogitsFn | None = None,
) -> tuple[Finding, ...]:
    """What can be seen of a network, on a few images, that makes any attack's figure doubtful.

    Args:
        logits_fn: images -> logits.
        threat: gradients are taken at the start of Auto-PGD in this threat model.
        images: (N, H, W, C) float, pixel units; the first `NUM_CHECKED` are taken.
        labels: (N,) int.
        followed: the losses that the attacks follow, see `followed_losses`.
        for_randomised: the attacks are made for a network that is randomised.
        seed: source of random numbers.
        indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
        batch_size: most images sent through the network at once.
        gradient_logits_fn: what the attacks follow; `logits_fn` if None.

    Returns:
        The findings, in order.

    Source:
        `checks.py` of the public code of Croce and Hein 2020, arXiv:2003.01690. Deviations: the
        gradients are those of cross-entropy and of the margin, which DLR is made of.
    """
    images, labels, indices = attack_inputs(images, labels, indices)
    images, labels, indices = (part[:NUM_CHECKED] for part in (images, labels, indices))

    def in_batches(look, *arrays):
        starts = range(0, len(images), batch_size)
        parts = [look(*(part[i : i + batch_size] for part in arrays)) for i in starts]
        return np.concatenate(parts)

    passes = [
        in_batches(lambda part: clean_logits(logits_fn, part), images)
        for _ in range(_NUM_PASSES - 1)
    ]
    findings = check_outputs(passes[0]) + check_dynamic(forward_graph(logits_fn, images))
    findings += check_randomised(
        passes,
        labels,
        for_randomised=for_randomised,
        traced_anew=in_batches(lambda part: clean_logits(logits_fn, part, trace=1), images),
    )
    followed_fn = exact_gradient_fn(logits_fn, gradient_logits_fn or logits_fn)
    stream = random_stream(seed, "checks")
    zero = {}
    for loss in LOSSES:
        look = functools.partial(_GradientProbe(threat, loss).is_zero, followed_fn, stream=stream)
        zero[loss] = in_batches(look, images, labels, indices)
    return tuple(findings + check_zero_gradients(zero, followed))


def cost_of_checks(num_images: int) -> tuple[int, int]:
    """Return the forwards and backwards of `check_network` on so many images, all together."""
    num_images = min(num_images, NUM_CHECKED)
    return num_images * (_NUM_PASSES + len(LOSSES)), num_images * len(LOSSES)


def followed_losses(attacks: Iterable[Any]) -> frozenset[str]:
    """Which of `LOSSES` have the gradients that some attacks follow; none for a black box.

    An attack on any other loss counts as following the margin, of which all are made.
    """
    losses: set[str] = set()
    for attack in attacks:
        if hasattr(attack, "attack"):
            losses |= followed_losses([attack.attack])
        elif isinstance(attack, Cascade):
            # With so many classes, no attack is left out.
            losses |= followed_losses(attack.attacks(10).values())
        elif attack.cost()[1]:
            losses.add("xent" if getattr(attack, "loss", "") == "xent" else "cw")
    return frozenset(losses)


@dataclasses.dataclass(frozen=True)
class _GradientProbe:
    """The gradient of a loss at a random point of the ball's surface."""

    threat: ThreatModel
    loss: str

    def is_zero(self, logits_fn, images, labels, indices, *, stream) -> np.ndarray:
        """(N,) bool: where the gradient vanishes although the logits are finite."""
        image, numbers = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        signature = (image, numbers, numbers, tf.TensorSpec((), tf.int64))
        probe = compiled(self, "_is_zero", (logits_fn,), signature)
        return probe(images, labels, indices, stream).numpy()

    def _is_zero(self, logits_fn, images, labels, indices, stream):
        draw = {"stream": stream, "indices": indices, "restart": tf.constant(0, tf.int64)}
        direction = random_direction(self.threat, images, **draw)
        start = self.threat.project(images + self.threat.epsilon * direction, images)

        def loss(logits):
            # The loss "cw" has no gradient where an image is misclassified, and needs none.
            return (
                -margin(logits, labels)
                if self.loss == "cw"
                else attack_loss(self.loss, logits, labels)
            )

        logits, gradient = logits_and_gradient(logits_fn, start, loss)
        has_none = tf.logical_not(tf.reduce_any(tf.not_equal(gradient, 0), axis=(1, 2, 3)))
        return tf.logical_and(has_none, is_finite(logits))
