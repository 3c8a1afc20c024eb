"""Accuracy against the knobs of an attack, and its final losses over restarts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from logit_reg.array_files import read_record, write_record
from logit_reg.attacks.ddn import DDN
from logit_reg.attacks.engine.active_set import clean_margin
from logit_reg.attacks.engine.attack import Attack
from logit_reg.attacks.engine.closest import ClosestAttack
from logit_reg.attacks.engine.examples import attack_inputs, check_examples
from logit_reg.attacks.engine.forward import clean_logits
from logit_reg.attacks.engine.losses import attack_loss
from logit_reg.attacks.fmn import FMN
from logit_reg.attacks.minimum_norm import MinimumNorm
from logit_reg.attacks.pgd import PGD
from logit_reg.evaluation.run import check_threat, evaluate
from logit_reg.progress import Progress
from logit_reg.threat import ThreatModel

_EPSILON_LABEL = "epsilon (pixel units)"

# Arrays of `Curves` in a file and their axes: examples N, survivors S, and the values of knobs.
_AXES = {
    "epsilons": "E",
    "epsilon_correct": "EN",
    "step_sizes": "A",
    "num_steps": "B",
    "grid_correct": "ABN",
    "restart_correct": "RN",
    "survivors": "S",
    "cross_entropy": "RS",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Which of N examples are robust at each of P values of one knob."""

    name: str
    """"epsilon", "steps", "restarts" or "step_size"."""
    label: str
    """Text for the horizontal axis, unit included."""
    x: np.ndarray
    """(P,) values of the knob, increasing."""
    correct: np.ndarray
    """(P, N) bool: classified right clean and under the attack."""
    reported: float | None = None
    """The value of the threat model or of the attack that a claim rests on, if there is one."""

    @property
    def accuracy(self) -> np.ndarray:
        """(P,) fraction that is robust."""
        return self.correct.mean(axis=1)


@dataclasses.dataclass(frozen=True)
class StepGrid:
    """Which of N examples are robust under PGD of A step sizes and B numbers of steps."""

    step_sizes: np.ndarray
    """(A,) increasing, pixel units."""
    num_steps: np.ndarray
    """(B,) int64, increasing."""
    correct: np.ndarray
    """(A, B, N) bool: classified right clean and at every iterate."""

    @property
    def accuracy(self) -> np.ndarray:
        """(A, B) fraction that is robust."""
        return self.correct.mean(axis=2)

    def against_step_size(self) -> Curve:
        """Accuracy against the step size, at the largest number of steps."""
        label = f"step size of PGD-{self.num_steps[-1]} (pixel units)"
        return Curve("step_size", label, self.step_sizes, self.correct[:, -1])

    def against_steps(self, step_size: float) -> Curve:
        """Accuracy against the number of steps, at the step size closest to this one."""
        row = int(np.argmin(np.abs(self.step_sizes - step_size)))
        label = f"steps of PGD, each of {self.step_sizes[row]:.3g}"
        return Curve("steps", label, self.num_steps, self.correct[row])


@dataclasses.dataclass(frozen=True)
class RestartLosses:
    """What R restarts of an attack did to N examples, all restarts on those that survive."""

    correct: np.ndarray
    """(R, N) bool: right clean and under this and all earlier restarts."""
    survivors: np.ndarray
    """(S,) int64 places of the examples that survive all restarts."""
    cross_entropy: np.ndarray
    """(R, S) float32 nats: loss of each survivor at the image that each restart returned."""

    def against_restarts(self) -> Curve:
        """Accuracy against the number of restarts."""
        return Curve("restarts", "restarts", np.arange(1, len(self.correct) + 1), self.correct)


@dataclasses.dataclass(frozen=True)
class Curves:
    """All curves of one model."""

    epsilon: Curve
    grid: StepGrid
    restarts: RestartLosses
    settings: dict
    """Provenance: "curves", "seed", "num_examples", "num_classes" and whatever else is known."""


@dataclasses.dataclass(frozen=True)
class CurveSettings:
    """Which values of each knob are tried; all but epsilon itself at the threat model's epsilon."""

    threat: ThreatModel
    """Norm, budget and pixel range."""
    loss: str = "xent"
    """Of PGD: "xent" or "cw"."""
    epsilon_factors: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(1, 21))
    """Radii, multiples of epsilon."""
    num_targets: int = 3
    """Target classes of the searches for the closest adversarial images."""
    step_factors: tuple[float, ...] = (0.04, 0.1, 0.25, 0.5, 0.65, 1.0, 2.0)
    """Step sizes, multiples of epsilon. Mosbach et al. found the best ones for logit squeezing at
    0.4 to 0.65, far from the usual small ones."""
    num_steps: tuple[int, ...] = (10, 20, 40, 100)
    """Numbers of steps; the restarts take the last one and the step size of `restart_factor`."""
    restart_factor: float = 0.25
    """Step size of the restarts, a multiple of epsilon."""
    num_restarts: int = 20
    batch_size: int = 200
    """Images attacked at once."""

    def run(
        self,
        logits_fn,
        images,
        labels,
        *,
        num_classes: int,
        seed: int = 0,
        settings: Mapping | None = None,
        show_progress: bool = False,
    ) -> Curves:
        """Compute all curves.

        Args:
            logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
            images: (N, H, W, C) float, pixel units.
            labels: (N,) int true classes.
            num_classes: K.
            seed: source of all random numbers.
            settings: more provenance.
            show_progress: draw progress bars.
        """
        epsilon = self.threat.epsilon
        pgd = PGD(
            self.threat,
            self.loss,
            num_steps=self.num_steps[-1],
            step_size=self.restart_factor * epsilon,
            early_stop=True,
        )
        options: dict[str, Any] = {
            "seed": seed,
            "batch_size": self.batch_size,
            "show_progress": show_progress,
        }
        data = (images, labels)
        return Curves(
            epsilon=accuracy_against_epsilon(
                logits_fn,
                self._searches(),
                *data,
                epsilons=[factor * epsilon for factor in self.epsilon_factors],
                **options,
            ),
            grid=accuracy_against_steps_and_size(
                logits_fn,
                pgd,
                *data,
                step_sizes=[factor * epsilon for factor in self.step_factors],
                num_steps=self.num_steps,
                **options,
            ),
            restarts=losses_over_restarts(
                logits_fn, pgd, *data, num_restarts=self.num_restarts, **options
            ),
            settings={
                "curves": dataclasses.asdict(self),
                "seed": seed,
                "num_examples": len(images),
                "num_classes": num_classes,
                **(settings or {}),
            },
        )

    def _searches(self) -> list[ClosestAttack]:
        """The attacks whose closest images count."""
        kinds = {"linf": (FMN, MinimumNorm), "l2": (FMN, DDN, MinimumNorm), "l1": (MinimumNorm,)}
        return [kind(self.threat, num_targets=self.num_targets) for kind in kinds[self.threat.norm]]


def accuracy_against_epsilon(
    logits_fn,
    attacks: Sequence[ClosestAttack],
    images,
    labels,
    *,
    epsilons: Sequence[float],
    seed: int = 0,
    batch_size: int = 200,
    show_progress: bool = False,
) -> Curve:
    """Accuracy at every epsilon, from the closest adversarial images that any attack finds.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attacks: at least one; all of one threat model, whose epsilon does not end their search.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int true classes.
        epsilons: radii, pixel units, increasing.
        seed: source of the random starts.
        batch_size: most images attacked at once.
        show_progress: draw a progress bar.

    Returns:
        The curve, never rising.

    Raises:
        ValueError: if there is no attack, or the threat models differ.
    """
    threats = {attack.threat for attack in attacks}
    if len(threats) != 1:
        raise ValueError(f"attacks must be at least one, of one threat model; got {list(attacks)}.")
    (threat,) = threats
    images, labels, indices = attack_inputs(images, labels, None)
    distances = []
    starts = range(0, len(images), batch_size)
    for i in Progress(starts, desc="minimum norm", unit="batch", disable=not show_progress):
        part = slice(i, i + batch_size)
        options = {"seed": seed, "indices": indices[part]}
        found = [
            attack.closest(logits_fn, images[part], labels[part], **options) for attack in attacks
        ]
        distances.append(np.min([each.distance for each in found], axis=0))
    x = _increasing("epsilons", epsilons)
    correct = np.concatenate(distances)[None] > x[:, None]
    return Curve("epsilon", _EPSILON_LABEL, x, correct, threat.epsilon)


def accuracy_against_steps_and_size(
    logits_fn,
    attack: PGD,
    images,
    labels,
    *,
    step_sizes: Sequence[float],
    num_steps: Sequence[int],
    seed: int = 0,
    batch_size: int = 200,
    show_progress: bool = False,
) -> StepGrid:
    """Accuracy under PGD for every pair of a step size and a number of steps.

    Runs of one step size share their random numbers, so that the longer one goes through all
    iterates of the shorter: accuracy never rises with the number of steps.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attack: everything but its steps and step size is kept.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int true classes.
        step_sizes: pixel units, increasing.
        num_steps: increasing.
        seed: source of the random starts.
        batch_size: most images attacked at once.
        show_progress: draw progress bars.

    Returns:
        The grid.
    """
    sizes = _increasing("step_sizes", step_sizes)
    counts = _increasing("num_steps", num_steps).astype(np.int64)
    rows: list[list[np.ndarray]] = []
    for step_size in Progress(sizes, desc="step sizes", disable=not show_progress):
        attacks = {
            str(count): dataclasses.replace(
                attack, step_size=float(step_size), num_steps=int(count), early_stop=True
            )
            for count in counts
        }
        found = evaluate(
            logits_fn,
            attacks,
            images,
            labels,
            batch_size=batch_size,
            seed=seed,
            # What a shorter run breaks the longer one breaks too.
            worst_case_only=True,
            with_checks=not rows,
        )
        rows.append([found.correct[str(count)] for count in counts])
    return StepGrid(sizes, counts, np.array(rows))


def losses_over_restarts(
    logits_fn,
    attack: Attack,
    images,
    labels,
    *,
    num_restarts: int,
    seed: int = 0,
    batch_size: int = 200,
    show_progress: bool = False,
) -> RestartLosses:
    """Accuracy against the number of restarts, and the final losses of what survives them all.

    Args:
        logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
        attack: is repeated with fresh random numbers on the examples that are still robust.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int true classes.
        num_restarts: R, at least 1.
        seed: source of all random numbers.
        batch_size: most images attacked at once.
        show_progress: draw a progress bar.

    Returns:
        A `RestartLosses`.

    Raises:
        ValueError: if num_restarts is below 1.
        ThreatModelError: if the attack leaves its threat model.

    Source:
        The histograms of Mosbach et al. 2018, arXiv:1810.12042.
    """
    if num_restarts < 1:
        raise ValueError(f"num_restarts must be at least 1; got {num_restarts}.")
    images, labels, indices = attack_inputs(images, labels, None)
    check_examples(logits_fn, images, labels)
    _, fooled = _losses(logits_fn, images, labels, batch_size)
    robust = ~fooled
    correct = np.zeros((num_restarts, len(images)), bool)
    cross_entropy = np.zeros((num_restarts, len(images)), np.float32)
    for restart in Progress(range(num_restarts), desc="restarts", disable=not show_progress):
        attacked = np.flatnonzero(robust)
        for start in range(0, len(attacked), batch_size):
            part = attacked[start : start + batch_size]
            found = attack.run(
                logits_fn,
                images[part],
                labels[part],
                seed=seed,
                indices=indices[part],
                restart=restart,
            )
            check_threat("restarts", found.adversarial, images[part], part, attack.threat)
            loss, fooled = _losses(logits_fn, found.adversarial, labels[part], batch_size)
            cross_entropy[restart, part] = loss
            robust[part] = ~fooled
        correct[restart] = robust
    survivors = np.flatnonzero(robust)
    return RestartLosses(correct, survivors, cross_entropy[:, survivors])


def save_curves(curves: Curves, path: Path | str) -> None:
    """Write all arrays to `path`, an .npz, and the settings to the .json beside it."""
    arrays = {
        "epsilons": curves.epsilon.x,
        "epsilon_correct": curves.epsilon.correct,
        "step_sizes": curves.grid.step_sizes,
        "num_steps": curves.grid.num_steps,
        "grid_correct": curves.grid.correct,
        "restart_correct": curves.restarts.correct,
        "survivors": curves.restarts.survivors,
        "cross_entropy": curves.restarts.cross_entropy,
    }
    write_record(path, arrays, curves.settings)


def load_curves(path: Path | str) -> Curves:
    """Read back what `save_curves` wrote.

    Raises:
        ValueError: if the files are missing or damaged, or do not fit together.
    """
    arrays, settings = read_record(path, _AXES)
    if not (isinstance(settings.get("num_classes"), int) and settings["num_classes"] >= 2):
        raise ValueError(f"{path}: num_classes is not a number of classes in the .json beside it.")
    try:
        threat = ThreatModel(**settings["curves"]["threat"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the .json beside it describes no curves ({error}).") from error
    x, correct = arrays["epsilons"], arrays["epsilon_correct"]
    return Curves(
        Curve("epsilon", _EPSILON_LABEL, x, correct, threat.epsilon),
        StepGrid(*(arrays[name] for name in ("step_sizes", "num_steps", "grid_correct"))),
        RestartLosses(
            *(arrays[name] for name in ("restart_correct", "survivors", "cross_entropy"))
        ),
        settings,
    )


def _losses(logits_fn, images, labels, batch_size):
    """(n,) cross-entropy and where the images are misclassified."""
    starts = range(0, len(images), batch_size)
    logits = np.concatenate([clean_logits(logits_fn, images[i : i + batch_size]) for i in starts])
    loss = attack_loss("xent", tf.constant(logits), tf.constant(labels)).numpy()
    return loss, ~(clean_margin(logits, labels) > 0)


def _increasing(name, values):
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or (np.diff(array) <= 0).any():
        raise ValueError(f"{name} must be increasing, at least one; got {list(values)}.")
    return array
