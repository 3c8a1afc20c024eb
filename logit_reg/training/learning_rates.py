"""Learning rates that are stretched over a training of known length."""

from typing import Any

from keras import ops
from keras.optimizers.schedules import CosineDecay, LearningRateSchedule, PolynomialDecay


class Cyclic(LearningRateSchedule):
    """Up from 0 to a peak at 2/5 of the training and down to 0, both linearly.

    Args:
        peak: the highest rate.
        total_steps: steps of the training.

    Source:
        Wong et al. 2020, arXiv:2001.03994 (locuslab/fast_adversarial: `np.interp(t, [0, epochs * 2
        // 5, epochs], [0, lr_max, 0])` with t counted after the update). So no rate is 0 but that
        of the last update, which changes no weight.
    """

    def __init__(self, peak: float, total_steps: int):
        self.peak = peak
        self.total_steps = total_steps
        self._rising = max(1, total_steps * 2 // 5)
        self._up = PolynomialDecay(0.0, self._rising, peak)
        self._down = PolynomialDecay(peak, max(1, total_steps - self._rising), 0.0)

    def __call__(self, step):
        """The () rate of an update, of which `step` were made before."""
        updates = ops.cast(step, "float32") + 1.0
        # Each is at least the peak where the other one holds.
        return ops.minimum(self._up(updates), self._down(updates - self._rising))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this schedule."""
        return {"peak": self.peak, "total_steps": self.total_steps}


def stretched(name: str, peak: float, total_steps: int) -> LearningRateSchedule:
    """A learning rate that depends on the length of the training.

    Args:
        name: "cosine" (Keras' `CosineDecay`: from the peak in the first update towards 0 at
            `total_steps`) or "cyclic" (see `Cyclic`).
        peak: the highest rate.
        total_steps: steps of the training.

    Returns:
        A schedule of the number of updates made so far.

    Raises:
        ValueError: if the name is unknown.
    """
    schedules = {"cosine": CosineDecay, "cyclic": Cyclic}
    if name not in schedules:
        raise ValueError(
            f"learning_rate_schedule must be one of steps, {', '.join(schedules)}; got {name!r}."
        )
    return schedules[name](peak, total_steps)
