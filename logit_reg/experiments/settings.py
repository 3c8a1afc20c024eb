"""The settings of a training run: one record, what each field means, and what it may be."""

import dataclasses
import reprlib
from typing import Any, get_args, get_type_hints

from keras.optimizers.schedules import LearningRateSchedule

from logit_reg.experiments.naming import describe, run_name
from logit_reg.objectives import Objective, collapse_threshold
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries import ADVERSARIES, adversary_class, reg_of
from logit_reg.training.adversaries.protocol import Adversary
from logit_reg.training.beta_schedule import BetaSchedule
from logit_reg.training.learning_rates import stretched
from logit_reg.training.loop import LoopSettings
from madry_compat.challenges import Challenge, challenge_for
from madry_compat.optimizers import piecewise_constant

TRAIN_DTYPES = ("float32", "float64", "bfloat16")
PAPER_BATCH_SIZE = 128

_DEMO_STEPS = 1000
# Whole numbers that a run can hold; a file may have any.
_INTEGERS = range(-(2**63), 2**63)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a training run computes.

    Its fields are keys of `run.json` and, with the same names, flags of train.py.

    Units:
        `sigma`, `epsilon` and `step_size` are in the challenge's pixel units: [0, 1] for MNIST,
        [0, 255] for CIFAR.
    """

    dataset: str
    """Name of a data set in `madry_compat.challenges.IMAGE_SETS`."""
    reg: str = "none"
    """What regularises the logits, one of `regularizers.REGULARIZERS`."""
    beta: float = 0.0
    """Weight of the penalty, at least 0; with `loss_reduction` "sum" it weighs 1/batch as much."""
    gamma: float = 0.0
    """Value that reg "similarity" pulls the logits towards, in logit units."""
    smoothing: float = 0.0
    """Lambda of label smoothing (Eq. 8), in [0, 1)."""
    omega: float = 0.0
    """Floor of the cross-entropy (Eq. 6) with reg "clip_xent" and "clip_xent_batch", in nats."""
    matrix_norm: str = "frobenius"
    """Norm of the batch's logits with reg "squeeze" and "similarity": "frobenius" or "nuclear"."""
    centre: str = "zero"
    """What reg "squeeze" pulls the logits towards: "zero", or "clean", those of the images before
    the attack."""
    beta_schedule: tuple[tuple[int, float], ...] = ((0, 1.0),)
    """(first step, factor of beta) pairs, ascending from step 0."""
    beta_ramp_steps: int = 0
    """Training steps over which beta grows from 0 linearly; 0: at once."""
    loss_reduction: str = "mean"
    """Of the cross-entropy over the batch: "mean", or "sum" as in the MNIST challenge."""
    sigma: float = 0.0
    """Standard deviation of the Gaussian noise on every training image, pixel units."""
    clip_noise: bool = True
    """Whether noisy images are clipped to the pixel range."""
    adversary: str = "none"
    """What finds the images to train on, one of `training.adversaries.ADVERSARIES`; it says which
    of the settings from here to `free_gradient` have an effect."""
    epsilon: float = 0.3
    """Linf budget of the adversary, pixel units."""
    num_steps: int = 0
    """Gradient steps of the adversary in one training step."""
    step_size: float = 0.0
    """Length of one of them, pixel units."""
    start_noise: float = 0.0
    """Size of the adversary's random start, pixel units; adversaries define its distribution."""
    loss_func: str = "xent"
    """What the adversary raises: "xent", or "cw", the margin."""
    random_start: bool = True
    """Whether the adversary starts at a random point of the ball."""
    ramp_steps: int = 0
    """Training steps over which epsilon and the step size grow from 0 linearly; 0: at once."""
    attack_batch_norm: str = "evaluation"
    """Mode of BatchNorm during the attack: "evaluation" or "training"."""
    replays: int = 1
    """Training steps in a row on the same minibatch."""
    free_gradient: str = "perturbation"
    """What free training's gradient is taken with respect to: "perturbation" or "image"."""
    width: int = 0
    """Width factor of the wide ResNet; 0 for a network of one size."""
    max_num_training_steps: int = _DEMO_STEPS
    """Optimiser steps in all; each replay of a minibatch counts."""
    training_batch_size: int = PAPER_BATCH_SIZE
    """Images a step, over all replicas."""
    step_size_schedule: tuple[tuple[int, float], ...] = ((0, 1e-4),)
    """(first step, learning rate) pairs, ascending from step 0."""
    weight_decay: float = 0.0
    """Weight of half the squared norms of all kernels in the total."""
    momentum: float = 0.0
    """Of the optimiser, in [0, 1); networks that are trained with Adam have none."""
    augment: bool = False
    """Whether images are padded by 2 pixels, cropped at random and flipped."""
    first_example: int = 0
    """How many of the first training images are left out: the challenge's validation images."""
    init_checkpoint: str = ""
    """Folder or prefix of the challenge's checkpoint that training goes on from; "" for none."""
    random_seed: int = 0
    """Seed of weights, order of the data, noise and adversary."""
    num_output_steps: int = 100
    """Steps between two rows of log.csv."""
    num_summary_steps: int = 100
    """Steps between two points of TensorBoard."""
    num_checkpoint_steps: int = 300
    """Steps between two checkpoints."""
    keep_checkpoint_steps: tuple[int, ...] = ()
    """Steps whose checkpoints are made and never removed."""
    train_dtype: str = "float32"
    """Precision of training, one of `TRAIN_DTYPES`; in bfloat16 the weights are float32."""
    max_to_keep: int = 3
    """Checkpoints that stay, the newest ones, besides those of `keep_checkpoint_steps`."""
    learning_rate_schedule: str = "steps"
    """"steps" of `step_size_schedule`; or its one rate as the peak of a "cosine" or "cyclic" rate,
    see `training.learning_rates`."""
    ema: bool = False
    """Whether the run's networks, for evaluation and export, have averages of the weights; see
    `training.averaging`."""
    ema_momentum: float = 0.999
    """Of these averages, in [0, 1)."""
    num_robustness_steps: int = -1
    """Training steps between two measurements of the accuracy under PGD on a few training images;
    0: none; -1: with an adversary a tenth of the training, from 100 to 500 steps, else none."""
    stop_on_overfitting: bool = False
    """Whether training ends where that accuracy has fallen to nothing, and leaves the checkpoint
    of its best."""

    @property
    def challenge(self) -> Challenge:
        """The challenge whose images and threat model the data set takes."""
        return challenge_for(self.dataset)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(
            reg=self.reg,
            beta=self.beta,
            gamma=self.gamma,
            smoothing=self.smoothing,
            omega=self.omega,
            reduction=self.loss_reduction,
            matrix_norm=self.matrix_norm,
            centre=self.centre,
        )

    @property
    def step_cost(self) -> tuple[int, int]:
        """Forward and backward passes of a batch in a training step."""
        adversary, wants_clean_logits = self.training_adversary, self.objective.wants_clean_logits
        forwards, backwards = adversary.cost
        has_them = adversary.wants_clean_logits
        return forwards + (wants_clean_logits and not has_them), backwards + wants_clean_logits

    @property
    def threat(self) -> ThreatModel:
        """The threat model of the adversary in training."""
        return ThreatModel("linf", self.epsilon, self.challenge.lower, self.challenge.upper)

    @property
    def collapse_threshold(self) -> float:
        """Beta from which on all-zero logits minimise the objective over free logits."""
        return collapse_threshold(
            self.training_batch_size,
            self.challenge.num_classes,
            reg=self.reg,
            smoothing=self.smoothing,
            reduction=self.loss_reduction,
            matrix_norm=self.matrix_norm,
            centre=self.centre,
        )

    @property
    def loop(self) -> LoopSettings:
        """Settings of the training loop."""
        names = {field.name for field in dataclasses.fields(LoopSettings)}
        values = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        if self.num_robustness_steps == -1:
            values["num_robustness_steps"] = self._usual_robustness_steps
        return LoopSettings(**values)

    @property
    def _usual_robustness_steps(self) -> int:
        if self.adversary == "none":
            return 0
        return max(100, min(500, self.max_num_training_steps // 10))

    @property
    def learning_rate(self) -> LearningRateSchedule:
        """The learning rate, as a function of the number of updates made before.

        Raises:
            ValueError: if `step_size_schedule` is none, or is not the one rate that it has to be.
        """
        pairs = self.step_size_schedule
        steps = piecewise_constant(pairs)
        if self.learning_rate_schedule == "steps":
            return steps
        if len(pairs) > 1:
            raise ValueError(
                f"--learning_rate_schedule={self.learning_rate_schedule} takes one rate, its peak, "
                f"as --step_size_schedule=[[0, {pairs[0][1]:g}]]; got {list(map(list, pairs))}."
            )
        return stretched(self.learning_rate_schedule, pairs[0][1], self.max_num_training_steps)

    @property
    def training_adversary(self) -> Adversary:
        """What finds the images to train on."""
        return adversary_class(self.adversary).from_settings(self)

    @property
    def description(self) -> str:
        """The method in a few words, such as "squeeze beta=2 + noise"."""
        return describe(
            dataclasses.asdict(self),
            self.training_adversary.description,
            is_whole_method=self.reg == reg_of(self.adversary) != "none",
        )

    @property
    def name(self) -> str:
        """Name of the run's folder, derived from the settings."""
        return run_name(dataclasses.asdict(self), self.description, DEFAULTS)


DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(RunSettings)
    if field.default is not dataclasses.MISSING
}


def check_settings(settings: RunSettings) -> None:
    """Check the types, which a file can have wrong, and let every part check its own settings.

    Raises:
        ValueError: for the first setting that is wrong, with what it must be.
    """
    for name, kind in get_type_hints(RunSettings).items():
        value = getattr(settings, name)
        if not _has_type(value, kind):
            wanted = kind if get_args(kind) else kind.__name__
            raise ValueError(f"{name} must be {wanted}; got {reprlib.repr(value)}.")
    if settings.train_dtype not in TRAIN_DTYPES:
        raise ValueError(
            f"train_dtype must be one of {', '.join(TRAIN_DTYPES)}; got {settings.train_dtype!r}."
        )
    _ = settings.objective, settings.threat, settings.loop, settings.training_adversary
    _ = BetaSchedule(settings.beta_schedule, settings.beta_ramp_steps)
    if settings.objective.wants_clean_logits and settings.adversary == "none":
        raise ValueError(
            f"reg {settings.reg!r}{' with centre clean' * (settings.centre == 'clean')} compares "
            f"the logits of adversarial images with those of the clean ones; give an --adversary "
            f"({', '.join(name for name in ADVERSARIES if name != 'none')})."
        )
    if settings.objective.is_flat_at_clean and settings.training_adversary.learns:
        raise ValueError(
            f"--adversary={settings.adversary} starts at no perturbation, where reg "
            f"{settings.reg!r} has no gradient to follow: it would stay where it starts; choose "
            f"--reg=alp or another adversary."
        )
    _ = settings.learning_rate
    if settings.challenge.paper.width and settings.width < 1:
        raise ValueError(f"width must be at least 1; got {settings.width}.")


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the type of a field of `RunSettings`."""
    parts = get_args(kind)
    if parts:
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and value in _INTEGERS
    return isinstance(value, kind)


def as_tuples(value):
    """A value read from JSON with tuples for its lists, as the settings have them."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value
