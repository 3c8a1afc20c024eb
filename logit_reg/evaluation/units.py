"""Notices of numbers that are probably in other units than the images."""

from collections.abc import Iterable, Iterator, Sequence

from logit_reg.attacks.engine.attack import Attack
from logit_reg.attacks.pgd import PGD
from logit_reg.messages import Finding
from logit_reg.threat import ThreatModel

# Half of a grey level of 256: an image that is stored in 8 bits does not change by less.
_HALF_LEVEL = 1 / 510
# Of the range, in l2 and l1, where one pixel alone can take the whole budget.
_SMALLEST_SUM = 1 / 100
# Of the budget: less than that is what all steps together move a pixel.
_SMALLEST_PATH = 1 / 10


def threat_notices(threat: ThreatModel, image_shape: Sequence[int]) -> Iterator[Finding]:
    """A budget that is out of proportion to the pixel range.

    Too large is one that reaches the uniform mid-grey from every image, so that no network can be
    right: half the range in linf, half of sqrt(H W C) ranges in l2, half of H W C ranges in l1.
    Too small is less than half of a grey level of 256 in linf, and less than a hundredth of the
    range in l2 and l1, where published budgets are a fifth of it and more.

    Args:
        threat: norm, budget and pixel range.
        image_shape: (H, W, C).

    Yields:
        At most one finding; its value is the budget as a share of the range.
    """
    width = threat.upper - threat.lower
    is_linf = threat.norm == "linf"
    largest = threat.distance_of(width / 2, image_shape)
    smallest = width * (_HALF_LEVEL if is_linf else _SMALLEST_SUM)
    told = f"epsilon {threat.epsilon:g} in {threat.norm}, on pixels in {_range(threat)},"
    if threat.epsilon >= largest:
        yield Finding(
            "budget_large",
            f"{told} reaches the uniform mid-grey from every image, so that no network can be "
            f"right: {_ask('epsilon', width, large=True)}",
            threat.epsilon / width,
        )
    elif threat.epsilon < smallest:
        small = (
            "less than half a grey level of 256" if is_linf else "below a hundredth of the range"
        )
        yield Finding(
            "budget_small",
            f"{told} is {small}, which leaves next to nothing to attack: "
            f"{_ask('epsilon', width, large=False)}",
            threat.epsilon / width,
        )


def step_notices(threat: ThreatModel, num_steps: int, step_size: float) -> Iterator[Finding]:
    """A step that is out of proportion to the budget.

    Args:
        threat: norm, budget and pixel range.
        num_steps: of a gradient attack.
        step_size: of one step, pixel units.

    Yields:
        A finding if one step is longer than the ball is wide, or all steps together are shorter
        than a tenth of its radius; its value is the step as a share of the budget.
    """
    told = f"step size {step_size:g}, with epsilon {threat.epsilon:g} and {num_steps} steps,"
    if step_size > 2 * threat.epsilon:
        what = "crosses the whole ball"
    elif num_steps and 0 < num_steps * step_size < _SMALLEST_PATH * threat.epsilon:
        what = f"moves at most {num_steps * step_size / threat.epsilon:.2g} of the budget"
    else:
        return
    yield Finding(
        "step_size",
        f"{told} {what}: give both in the images' own pixel units.",
        step_size / threat.epsilon,
    )


def noise_notices(stddev: float, lower: float, upper: float) -> Iterator[Finding]:
    """Training noise that is out of proportion to the pixel range.

    Args:
        stddev: of the Gaussian noise, pixel units.
        lower: lowest pixel value.
        upper: highest pixel value.

    Yields:
        A finding if it is above the range, or at most half of a grey level of 256; its value is
        the noise as a share of the range.
    """
    width = upper - lower
    if stddev > width:
        what = "drowns the images"
    elif 0 < stddev <= width * _HALF_LEVEL:
        what = "is at most half a grey level of 256"
    else:
        return
    yield Finding(
        "noise",
        f"noise of standard deviation {stddev:g}, on pixels in [{lower:g}, {upper:g}], {what}: "
        f"{_ask('sigma', width, large=stddev > width)}",
        stddev / width,
    )


def claim_notices(claim: float) -> Iterator[Finding]:
    """A claim in per cent that was probably meant as a fraction.

    Args:
        claim: the claimed robust accuracy, per cent.

    Yields:
        A finding if it is above 0 and at most 1.
    """
    if 0 < claim <= 1:
        yield Finding(
            "claim",
            f"the claim is {claim:g} %: if {100 * claim:g} % is meant, give it in per cent.",
            claim,
        )


def attack_notices(attacks: Iterable[Attack], image_shape: Sequence[int]) -> list[Finding]:
    """The notices of the threat models and steps of attacks, each once.

    Args:
        attacks: what is going to be run.
        image_shape: (H, W, C).
    """
    found: dict[Finding, None] = {}
    for attack in attacks:
        found |= dict.fromkeys(threat_notices(attack.threat, image_shape))
        # Restarts wrap the attack that has the steps.
        inner = getattr(attack, "attack", attack)
        if isinstance(inner, PGD):
            found |= dict.fromkeys(step_notices(inner.threat, inner.num_steps, inner.step_size))
    return list(found)


def _range(threat: ThreatModel) -> str:
    return f"[{threat.lower:g}, {threat.upper:g}]"


def _ask(name: str, width: float, *, large: bool) -> str:
    """Name the slip: the two ranges that images have are [0, 1] and [0, 255]."""
    other = "[0, 255]" if large and width <= 2 else "[0, 1]" if not large and width > 2 else None
    meant = f"is it meant for {other}? " if other else ""
    return f"{meant}give {name} in the images' own pixel units."
