"""The losses that attacks ascend, and who counts as fooled."""

import numpy as np
import tensorflow as tf

LOSSES = ("xent", "cw")
"""Losses for any number of classes; "dlr" needs at least 3."""

# Keeps 0 / 0 out of DLR, as published.
_TINY = 1e-12


def is_finite(logits):
    """Where all logits of an image are finite: (N, K) -> (N,) bool."""
    return tf.reduce_all(tf.math.is_finite(logits), axis=-1)


def label_mask(logits, labels):
    """Where the true logits stand: (N, K), (N,) int -> (N, K) bool."""
    num_classes = logits.shape[-1] or tf.shape(logits)[-1]
    return tf.one_hot(labels, num_classes, True, False, dtype=bool)


def margin(logits, labels):
    """True logit minus the largest other logit: positive where the image is classified right.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) float; -inf where any logit of the image is not finite, so that it counts as wrong.
    """
    true_logit, other = margin_terms(logits, labels)
    # Never NaN: compiled code turns `not (NaN > 0)` into `NaN <= 0`.
    return tf.where(is_finite(logits), true_logit - other, -np.inf)


def target_difference(logits, labels, targets):
    """The logit of a target class minus that of the true one.

    Args:
        logits: (N, K) float.
        labels: (N,) int true classes.
        targets: (N,) int.

    Returns:
        (N,) float.
    """
    wrong, true = (tf.gather(logits, classes, batch_dims=1) for classes in (targets, labels))
    return wrong - true


def margin_terms(logits, labels):
    """True logit and largest other logit.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) float each.
    """
    logits = tf.convert_to_tensor(logits)
    is_label = label_mask(logits, labels)
    true_logit = tf.reduce_sum(tf.where(is_label, logits, 0), axis=-1)
    # Masked, where the challenges subtract 1e4: that fails on logits of such a size.
    other = tf.reduce_max(tf.where(is_label, logits.dtype.min, logits), axis=-1)
    return true_logit, other


def probability_margin_terms(logits, labels):
    """The terms of the margin in probabilities, of use however sure the network is.

    The margin p_other - p_true is the largest wrong probability plus the sum of the wrong ones,
    less 1. In this form nothing is lost where p_true rounds to 1.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) float64 each: p_true - 1 and p_other, both over p_other as a constant, so that
        gradients keep their direction and a size near 1.
    """
    log_probability = tf.nn.log_softmax(tf.cast(logits, tf.float64))
    is_label = label_mask(log_probability, labels)
    wrong = tf.where(is_label, log_probability.dtype.min, log_probability)
    largest = tf.reduce_max(tf.stop_gradient(wrong), axis=-1, keepdims=True)
    wrong = tf.exp(wrong - largest)
    return -tf.reduce_sum(wrong, axis=-1), tf.reduce_max(wrong, axis=-1)


def is_fooled(logits, labels):
    """Where the prediction is wrong: a tie, or a logit that is not finite, counts as wrong.

    Args:
        logits: (N, K) float.
        labels: (N,) int.

    Returns:
        (N,) bool.
    """
    return tf.logical_not(margin(logits, labels) > 0)


def attack_loss(loss: str, logits, labels, confidence: float = 0.0):
    """A loss that attackers ascend, per example.

    Args:
        loss: "xent", "cw" for the margin of Carlini and Wagner, or "dlr" for the difference of
            logits ratio, -margin / (largest logit - third largest).
        logits: (N, K) float.
        labels: (N,) int.
        confidence: kappa of "cw": the loss is -relu(margin + kappa), so its gradient stops where
            the example is misclassified by more than kappa.

    Returns:
        (N,) float.

    Raises:
        ValueError: if there is no such loss, or none for so few classes.

    Source:
        The challenges' `pgd_attack.py` (confidence 50); Shafahi et al., Eq. 4 (confidence 0);
        "dlr": Croce and Hein 2020, arXiv:2003.01690, Eq. 6.
    """
    if loss == "xent":
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    if loss == "cw":
        return -tf.nn.relu(margin(logits, labels) + confidence)
    check_loss(loss)
    num_classes = logits.shape[-1]
    if num_classes is not None and num_classes < 3:
        raise ValueError(f"dlr needs at least 3 classes; got {num_classes}: use xent or cw.")
    top = tf.math.top_k(logits, 3).values
    return -margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def check_loss(loss: str) -> None:
    """Refuse a loss that `attack_loss` does not know.

    Args:
        loss: "xent", "cw" or "dlr".

    Raises:
        ValueError: if it is another one.
    """
    if loss not in (*LOSSES, "dlr"):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}; got {loss!r} "
            "(dlr is a third, for 3 classes or more)."
        )
