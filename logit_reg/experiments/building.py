"""Building what a run trains: its network, the model around it, and where it starts from."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import keras

from logit_reg.attacks.engine.low_precision import bfloat16_copy
from logit_reg.experiments.settings import RunSettings
from logit_reg.training.beta_schedule import BetaSchedule
from logit_reg.training.model import RegularizedModel
from madry_compat.networks import build
from madry_compat.optimizers import ADAM_EPSILON, TF1Adam, TF1Momentum
from madry_compat.tf1_checkpoints import has_training_state, load_network, load_training_state


def build_network(settings: RunSettings):
    """The untrained network of a run, initialised from its seed.

    Its weights are float64 or float32; in bfloat16 `build_model` trains a copy.
    """
    keras.utils.set_random_seed(settings.random_seed)
    challenge = settings.challenge
    with _default_dtype("float64" if settings.train_dtype == "float64" else "float32"):
        return build(challenge.network, settings.width, challenge.num_classes)


@contextlib.contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    """What Keras builds inside has this dtype, its inputs included."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def build_model(settings: RunSettings, network) -> RegularizedModel:
    """A network wrapped and compiled for training.

    Its `network` is this one or, in bfloat16, a copy whose weights, logits and normalisation stay
    in float32, as penalty, loss and optimiser do.
    """
    challenge = settings.challenge
    if settings.train_dtype == "bfloat16":
        network = bfloat16_copy(network, for_training=True)
    with warnings.catch_warnings():
        # The commands notice it too, by the names of their flags.
        warnings.filterwarnings("ignore", message=".* in the images' pixel units")
        model = RegularizedModel(
            network,
            settings.objective,
            sigma=settings.sigma,
            clip_noise=settings.clip_noise,
            bounds=(challenge.lower, challenge.upper),
            adversary=settings.training_adversary,
            augment=settings.augment,
            weight_decay=settings.weight_decay,
            beta_schedule=BetaSchedule(settings.beta_schedule, settings.beta_ramp_steps),
            seed=settings.random_seed,
        )
    rate = settings.learning_rate
    if challenge.training.optimizer == "adam":
        # A mean loss has gradients 1/b as large: with epsilon / b Adam takes the same steps.
        is_mean = settings.loss_reduction == "mean"
        divisor = settings.training_batch_size if is_mean else 1
        optimizer = TF1Adam(rate, epsilon=ADAM_EPSILON / divisor)
    else:
        optimizer = TF1Momentum(rate, settings.momentum)
    model.compile(optimizer=optimizer)
    return model


def start_from_checkpoint(model: RegularizedModel, path: Path, reduction: dict) -> int:
    """Fill a model from a challenge's checkpoint.

    Args:
        model: compiled; its network must be the checkpoint's.
        path: prefix or folder of a TF1 bundle.
        reduction: loss_reduction and batch_size of the training that goes on.

    Returns:
        The step that training goes on from; 0 for a checkpoint of weights alone.

    Raises:
        ValueError: if the checkpoint is broken or of another network.
    """
    source = load_network(path)
    ours, theirs = model.network.variables, source.variables
    if [v.shape for v in ours] != [v.shape for v in theirs]:
        raise ValueError(f"{path} holds another network than this run's; check --dataset, --width.")
    for variable, value in zip(ours, theirs, strict=True):
        variable.assign(value)
    if not has_training_state(path):
        return 0
    return load_training_state(path, model.network, model.optimizer, **reduction)
