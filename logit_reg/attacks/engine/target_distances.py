"""How far each class is, if the network is linear: an order for targeted attacks."""

import dataclasses

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveExamples
from logit_reg.attacks.engine.forward import batch_spec, compiled
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.hyperplane import move_to_hyperplane
from logit_reg.attacks.engine.losses import target_difference
from logit_reg.attacks.engine.low_precision import exact_gradient_fn
from logit_reg.threat import ThreatModel

# Share of the way to a boundary that rounding may take.
_ROUNDING = 1e-4

MOST_CANDIDATES = 100
"""Wrong classes that are looked at, those with the largest clean logits, as published."""


def class_distances(
    active: ActiveExamples, threat: ThreatModel, *, in_range: bool = False
) -> np.ndarray:
    """How far the boundary to each class is from the clean images, by the gradient there.

    Args:
        active: the examples; only those that are still robust are looked at.
        threat: decides the norm, and the pixel range.
        in_range: whether the way there keeps to the pixel range.

    Returns:
        (N, K) float, pixel units: the difference of the logits over the dual norm of its gradient,
        or with `in_range` the length of the projection; infinite for classes that were not looked
        at, have no slope or are out of reach.

    Source:
        Melamed et al. 2024, arXiv:2407.02240 (MALT), section 3. Deviation: the paper divides by
        the Euclidean norm; the dual norm is exact for linear networks in every norm.
    """
    rows = active.rows
    distances = np.full(active.clean_logits.shape, np.inf)
    if not len(rows):
        return distances
    ranked = [targets[rows] for _, targets in active.targets(MOST_CANDIDATES)]
    targets = np.stack(ranked, axis=1)
    examples = active.examples
    images, labels = examples.images[rows], examples.labels[rows]
    numbers = batch_spec((), tf.int64)
    signature = (batch_spec(images.shape[1:]), numbers, batch_spec(targets.shape[1:], tf.int64))
    functions = (exact_gradient_fn(*active.functions),)
    look = compiled(_Look(threat, in_range), "distances", functions, signature)
    found = look(images, labels, targets).numpy()
    active.count(len(rows), forwards=targets.shape[1], backwards=targets.shape[1])
    distances[rows[:, None], targets] = found
    return distances


@dataclasses.dataclass(frozen=True)
class _Look:
    threat: ThreatModel
    in_range: bool

    def distances(self, logits_fn, images, labels, targets):
        """(N, number of targets) distances to the linearised boundaries."""

        def distance(targets):
            def rise(logits):
                return target_difference(logits, labels, targets)

            logits, gradient = logits_and_gradient(logits_fn, images, rise)
            gap = tf.cast(-rise(logits), images.dtype)
            if self.in_range:
                return self._projected(images, gradient, gap)
            slope = self.threat.slope(gradient)
            return tf.where(slope > 0, tf.math.divide_no_nan(gap, slope), np.inf)

        found = tf.map_fn(distance, tf.transpose(targets), fn_output_signature=images.dtype)
        return tf.transpose(found)

    def _projected(self, images, gradient, gap):
        """(N,) distances within the pixel range; infinite where it ends before the boundary."""
        move, length = move_to_hyperplane(images, gradient, -gap, self.threat)
        gained = tf.reduce_sum(gradient * move, axis=(1, 2, 3))
        return tf.where(gained >= (1 - _ROUNDING) * gap, length, np.inf)
