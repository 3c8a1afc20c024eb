"""The attacks: one file and one frozen dataclass each. Adding one: its file and a line here."""

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
from logit_reg.attacks.pgd import PGD as PGD
from logit_reg.attacks.restarts import Restarts as Restarts
from logit_reg.attacks.square import Square as Square
