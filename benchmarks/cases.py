"""What is measured: each case with all its settings."""

import dataclasses

from logit_reg.training.adversaries import ADVERSARIES

TRAINED = ("natural", "squeezed", "adversarial")
"""Networks that the harness trains."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work that every contender does."""

    name: str
    """On the command line and in the results."""
    kind: str
    """What is done, a key of `contenders.CONTENDERS`."""
    network: str = "adversarial"
    """"natural", "squeezed" or "adversarial" (trained by the harness), "mnist_cnn" (fresh weights),
    "wide_resnet-N" (fresh weights, width N), or a `.keras` or TRADES `.npz` file."""
    num_images: int = 1000
    """Images attacked; a training case has `num_batches` of `batch_size` instead."""
    batch_size: int = 200
    """Images sent through the network at once."""
    epsilon: float = 0.3
    """Linf budget, pixel units."""
    upper: float = 1.0
    """Highest pixel value; the lowest is 0."""
    num_steps: int = 0
    """Updates of an attack, from each start."""
    step_size: float = 0.01
    """Length of an update, pixel units."""
    num_restarts: int = 1
    """Random starts."""
    num_samples: int = 0
    """Queries for one gradient of SPSA."""
    num_batches: int = 0
    """Training steps in one repetition."""
    repeats: int = 5
    """How often each contender does it."""
    seed: int = 0
    """Source of random numbers; every library draws its own from it."""
    contenders: tuple[str, ...] = ()
    """Who takes part; everybody of the kind if empty."""
    adversary: str = "none"
    """Of a step of training, a key of `training.adversaries.ADVERSARIES`."""

    @property
    def work(self) -> int:
        """Units of work in one repetition, of the unit that `unit` names."""
        if self.kind in ("pgd", "restarts"):
            return self.num_images * self.num_steps * self.num_restarts
        return self.num_batches * self.batch_size or self.num_images

    @property
    def unit(self) -> str:
        """What `work` counts; early stops do less than the nominal work of "restarts"."""
        return "image-steps" if self.kind in ("pgd", "restarts") else "images"

    @property
    def num_gradients(self) -> int:
        """Input gradients that every contender takes in one repetition; 0 where it varies."""
        return self.work if self.kind == "pgd" else 0

    def quick(self) -> "Case":
        """The same case at a size that shows that it runs, and nothing about speed."""
        return dataclasses.replace(
            self,
            num_images=max(1, self.num_images // 20),
            batch_size=min(self.batch_size, 50),
            num_steps=min(self.num_steps, 10),
            num_restarts=min(self.num_restarts, 2),
            num_batches=min(self.num_batches, 2),
            repeats=min(self.repeats, 2),
        )


MATRIX_PEAK = Case("matrix-peak", "matrix_peak", network="", num_images=0, repeats=20)
"""What the machine can do at best; measured before everything else."""

CASES = (
    Case("pgd40", "pgd", num_steps=40),
    Case("restarts-natural", "restarts", "natural", num_steps=100, num_restarts=10, repeats=1),
    Case("restarts-squeezed", "restarts", "squeezed", num_steps=100, num_restarts=10, repeats=1),
    Case("autoattack-robust", "autoattack", num_images=500, repeats=1),
    Case("autoattack-squeezed", "autoattack", "squeezed", num_images=500, repeats=1),
    Case("spsa", "spsa", num_steps=20, num_samples=128, repeats=1),
    Case("training", "training", "mnist_cnn", batch_size=128, num_batches=100),
    Case(
        "adversarial-training",
        "adversarial_training",
        "mnist_cnn",
        batch_size=128,
        num_steps=7,
        step_size=0.1,
        num_batches=20,
    ),
    *(
        Case(
            f"step-{adversary}{suffix}",
            "method_step",
            network,
            batch_size=128,
            epsilon=epsilon,
            upper=upper,
            num_batches=num_batches,
            repeats=3,
            adversary=adversary,
        )
        for network, suffix, epsilon, upper, num_batches in (
            ("mnist_cnn", "", 0.3, 1.0, 20),
            ("wide_resnet-1", "-narrow", 8.0, 255.0, 6),
        )
        for adversary in ADVERSARIES
    ),
    Case("startup", "startup", "natural", num_images=1),
    Case("images-100", "pgd", num_images=100, num_steps=40, contenders=("ours",)),
    Case("images-1000", "pgd", num_images=1000, num_steps=40, contenders=("ours",)),
    Case("images-10000", "pgd", num_images=10_000, num_steps=40, repeats=2, contenders=("ours",)),
    *(
        Case(
            f"width-{width}",
            "pgd",
            f"wide_resnet-{width}",
            num_images=20,
            batch_size=20,
            epsilon=8.0,
            upper=255.0,
            # As the challenge evaluates, madry-cifar10.
            num_steps=20,
            step_size=1.0,
            repeats=3,
            contenders=("ours", "pytorch"),
        )
        for width in (1, 4, 10)
    ),
)

DEFAULT = ("pgd40", "training", "adversarial-training", "startup")
"""What `make bench` measures, in about half an hour on two cores; all cases take hours."""


def choose(names: list[str]) -> list[Case]:
    """Cases by name.

    Args:
        names: of cases, or of what several begin with ("restarts", "width"); "all" for all.

    Returns:
        The cases, in the order of `CASES`.

    Raises:
        ValueError: if a name fits no case.
    """
    chosen = set()
    for name in names:
        fitting = {
            case.name
            for case in CASES
            if name in ("all", case.name) or case.name.startswith(f"{name}-")
        }
        if not fitting:
            raise ValueError(
                f"--cases: no case {name!r}; there are {', '.join(case.name for case in CASES)}."
            )
        chosen |= fitting
    return [case for case in CASES if case.name in chosen]
