"""The network as the attack inside a training step sees it."""

import functools

import keras

from logit_reg.attacks.engine.forward import LogitsFn
from logit_reg.attacks.engine.inference_copy import following_copy

BATCH_NORM_MODES = ("evaluation", "training")


def check_batch_norm(batch_norm: str) -> None:
    """Check a mode of BatchNorm.

    Raises:
        ValueError: if there is no such mode.
    """
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(
            f"batch_norm must be one of {', '.join(BATCH_NORM_MODES)}; got {batch_norm!r}."
        )


def attacked_network(network: keras.Model, batch_norm: str) -> LogitsFn:
    """Images -> logits, from the weights of the moment.

    Args:
        network: images -> logits, in training.
        batch_norm: "training" normalises by the batch and moves the averages with every pass.
    """
    if batch_norm == "training":
        return functools.partial(network, training=True)
    return following_copy(network)
