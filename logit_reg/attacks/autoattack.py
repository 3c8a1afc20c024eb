"""AutoAttack: a fixed cascade of attacks, each on what is still robust after the ones before."""

import dataclasses

import numpy as np

from logit_reg.attacks.apgd import APGD, APGDTargeted
from logit_reg.attacks.engine.attack import Attack
from logit_reg.attacks.engine.cascade import CascadeAttack
from logit_reg.attacks.engine.checks import (
    Finding,
    check_finite,
    check_network,
    cost_of_checks,
    followed_losses,
    warn,
)
from logit_reg.attacks.engine.forward import count_classes
from logit_reg.attacks.fab import FAB, FABTargeted
from logit_reg.attacks.restarts import Restarts
from logit_reg.attacks.square import Square
from logit_reg.threat import ThreatModel

VERSIONS = ("standard", "plus", "rand")

_NUM_RESTARTS = 5
# In l1 of APGD-CE; and the most targets of APGD-T.
_NUM_L1_RESTARTS = 5
_MOST_L1_TARGETS = 5
_NUM_SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class AutoAttack(CascadeAttack):
    """The cascade whose worst case the field quotes.

    "standard": APGD-CE, APGD-T, FAB-T, Square; in l1 APGD-CE with 5 restarts and APGD-T with at
    most 5 targets. "plus": APGD-CE and APGD-DLR with 5 restarts,
    FAB with 5 restarts, Square, APGD-T, FAB-T. "rand", for randomised networks: APGD-CE and
    APGD-DLR with gradients averaged over 20 passes. In l1 "plus" is not defined. Signs that the
    figure cannot be trusted are issued as `AttackWarning`s, each carrying a `Finding`.

    Source:
        Croce and Hein 2020, arXiv:2003.01690, and its public code; l1: Croce and Hein
        2021, arXiv:2103.01208, and the same code. Deviations: in l1 "rand" goes through larger
        balls, too; with fewer than 4 classes, attacks on losses that are not defined are left out;
        see also each attack.
    """

    threat: ThreatModel
    """Norm, budget and pixel range."""
    version: str = "standard"
    """"standard", "plus" or "rand"."""
    num_steps: int = 100
    """Updates of each run of APGD and FAB."""
    num_targets: int = 9
    """Target classes of APGD-T and FAB-T, cut to the number of wrong classes."""
    num_queries: int = 5000
    """Queries of Square."""

    def __post_init__(self):
        if self.version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}; got {self.version!r}.")
        if self.version == "plus":
            self.threat.check_norm('AutoAttack "plus"', "linf", "l2")
        self.attacks(num_classes=10)

    def _attack(self, active):
        examples = active.examples
        inputs = (active.logits_fn, examples.images, examples.labels)
        options = {"seed": examples.seed, "indices": examples.indices}
        warn(self.checks(*inputs, **options, gradient_logits_fn=examples.gradient_logits_fn))
        forwards, backwards = cost_of_checks(len(examples.images))
        active.count(1, forwards=forwards, backwards=backwards)
        warn(check_finite(~np.isfinite(active.clean_logits).all(axis=1)))
        super()._attack(active)

    def cost(self):
        """Return the most forwards and backwards that one image can take, with 10 classes."""
        forwards, backwards = super().cost()
        more_forwards, more_backwards = cost_of_checks(1)
        return forwards + more_forwards, backwards + more_backwards

    def checks(
        self, logits_fn, images, labels, *, seed=0, indices=None, gradient_logits_fn=None
    ) -> tuple[Finding, ...]:
        """What can be seen before the attacks that makes their figure doubtful.

        Args:
            logits_fn: images -> logits.
            images: (N, H, W, C) float, pixel units.
            labels: (N,) int.
            seed: source of random numbers.
            indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
            gradient_logits_fn: what the attacks follow; `logits_fn` if None.

        Returns:
            Findings; that Square lowers the worst case is seen only by `run`.

        Source:
            See `check_network`. Deviation: the number of targets is cut instead of failing.
        """
        num_classes = count_classes(logits_fn, images)
        found = check_network(
            logits_fn,
            self.threat,
            images,
            labels,
            followed=followed_losses([self]),
            for_randomised=self.for_randomised,
            seed=seed,
            indices=indices,
            gradient_logits_fn=gradient_logits_fn,
        )
        return (*self.check_num_classes(num_classes), *found)

    @property
    def for_randomised(self) -> bool:
        """Whether the attacks are made for randomised networks."""
        return self.version == "rand"

    def _all_attacks(self) -> dict[str, Attack]:
        num_samples = _NUM_SAMPLES if self.version == "rand" else 1
        ce = APGD(self.threat, "xent", self.num_steps, num_samples)
        dlr = APGD(self.threat, "dlr", self.num_steps, num_samples)
        if self.version == "rand":
            return {"apgd-ce": ce, "apgd-dlr": dlr}
        is_l1 = self.threat.norm == "l1"
        num_targets = min(self.num_targets, _MOST_L1_TARGETS) if is_l1 else self.num_targets
        targeted: dict[str, Attack] = {
            "apgd-t": APGDTargeted(self.threat, num_targets, self.num_steps),
            "fab-t": FABTargeted(self.threat, self.num_targets, self.num_steps, early_stop=True),
        }
        square = {"square": Square(self.threat, self.num_queries)}
        if self.version == "standard":
            first = Restarts(ce, _NUM_L1_RESTARTS) if is_l1 else ce
            return {"apgd-ce": first, **targeted, **square}
        fab = FAB(self.threat, self.num_steps, early_stop=True)
        return {
            "apgd-ce": Restarts(ce, _NUM_RESTARTS),
            "apgd-dlr": Restarts(dlr, _NUM_RESTARTS),
            "fab": Restarts(fab, _NUM_RESTARTS),
            **square,
            **targeted,
        }

    def check_num_classes(self, num_classes: int) -> list[Finding]:
        """What so few classes leave out.

        Args:
            num_classes: K, at least 2.

        Returns:
            Findings "num_classes" and "num_targets".
        """
        findings = []
        left_out = self._all_attacks().keys() - self.attacks(num_classes).keys()
        if left_out:
            names = ", ".join(sorted(left_out))
            findings.append(
                Finding(
                    "num_classes",
                    f"with {num_classes} classes {names} is not defined and left out: DLR needs "
                    "3 classes, targeted DLR 4.",
                    num_classes,
                )
            )
        if self.version != "rand" and self.num_targets > num_classes - 1:
            findings.append(
                Finding(
                    "num_targets",
                    f"AutoAttack aims at {self.num_targets} wrong classes, of which {num_classes} "
                    f"classes leave {num_classes - 1}: each is aimed at.",
                    num_classes - 1,
                )
            )
        return findings
