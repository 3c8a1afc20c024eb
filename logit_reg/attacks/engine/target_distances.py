"""How far each class is, if the network is linear: an order for targeted attacks."""

import dataclasses

import numpy as np
import tensorflow as tf

from logit_reg.attacks.engine.active_set import ActiveExamples
from logit_reg.attacks.engine.forward import batch_spec, compiled
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.low_precision import exact_gradient_fn
from logit_reg.threat import ThreatModel

MOST_CANDIDATES = 100
"""Wrong classes that are looked at, those with the largest clean logits, as published."""


def class_distances(active: ActiveExamples, threat: ThreatModel) -> np.ndarray:
    """How far the boundary to each class is from the clean images, by the gradient there.

    Args:
        active: the examples; only those that are still robust are looked at.
        threat: decides the norm.

    Returns:
        (N, K) float, pixel units: the difference of the logits over the dual norm of its gradient;
        infinite for classes that were not looked at or have no slope.

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
    signature = (
        batch_spec(images.shape[1:]),
        batch_spec((), tf.int64),
        batch_spec(targets.shape[1:], tf.int64),
    )
    look = compiled(_Look(threat), "slopes", (exact_gradient_fn(*active.functions),), signature)
    slopes = look(images, labels, targets).numpy()
    active.count(len(rows), forwards=targets.shape[1], backwards=targets.shape[1])
    logits = active.clean_logits[rows]
    gaps = np.take_along_axis(logits, labels[:, None], 1) - np.take_along_axis(logits, targets, 1)
    found = np.divide(gaps, slopes, out=np.full(gaps.shape, np.inf), where=slopes > 0)
    distances[rows[:, None], targets] = found
    return distances


@dataclasses.dataclass(frozen=True)
class _Look:
    threat: ThreatModel

    def slopes(self, logits_fn, images, labels, targets):
        """(N, number of targets) dual norms of the gradients of target minus true logit."""

        def slope(targets):
            def loss(logits):
                target_logit = tf.gather(logits, targets, batch_dims=1)
                return target_logit - tf.gather(logits, labels, batch_dims=1)

            return self.threat.slope(logits_and_gradient(logits_fn, images, loss)[1])

        found = tf.map_fn(slope, tf.transpose(targets), fn_output_signature=images.dtype)
        return tf.transpose(found)
