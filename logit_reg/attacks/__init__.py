"""The attacks: one file and one frozen dataclass each. Adding one: its file and a line here."""

from logit_reg.attacks.adaptive import Adaptive as Adaptive
from logit_reg.attacks.apgd import APGD as APGD
from logit_reg.attacks.apgd import APGDTargeted as APGDTargeted
from logit_reg.attacks.attack import Attack as Attack
from logit_reg.attacks.attack import AttackResult as AttackResult
from logit_reg.attacks.attack import margin as margin
from logit_reg.attacks.autoattack import AutoAttack as AutoAttack
from logit_reg.attacks.checks import AttackWarning as AttackWarning
from logit_reg.attacks.fab import FAB as FAB
from logit_reg.attacks.fab import FABTargeted as FABTargeted
from logit_reg.attacks.fgsm import FGSM as FGSM
from logit_reg.attacks.logit_scaling import ScaledPGD as ScaledPGD
from logit_reg.attacks.md import MD as MD
from logit_reg.attacks.minimum_norm import ClosestImages as ClosestImages
from logit_reg.attacks.minimum_norm import MinimumNorm as MinimumNorm
from logit_reg.attacks.minimum_norm import accuracy_curve as accuracy_curve
from logit_reg.attacks.multitargeted import MultiTargeted as MultiTargeted
from logit_reg.attacks.odi import ODI as ODI
from logit_reg.attacks.pgd import PGD as PGD
from logit_reg.attacks.random_noise import RandomNoise as RandomNoise
from logit_reg.attacks.restarts import Restarts as Restarts
from logit_reg.attacks.spsa import SPSA as SPSA
from logit_reg.attacks.square import Square as Square
from logit_reg.attacks.transfer import Replay as Replay
from logit_reg.attacks.transfer import Transfer as Transfer
