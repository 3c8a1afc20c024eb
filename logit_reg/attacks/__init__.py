"""The attacks: one file and one frozen dataclass each. Adding one: its file and a line here."""

from logit_reg.attacks.attack import Attack as Attack
from logit_reg.attacks.attack import AttackResult as AttackResult
from logit_reg.attacks.attack import margin as margin
from logit_reg.attacks.fgsm import FGSM as FGSM
from logit_reg.attacks.pgd import PGD as PGD
from logit_reg.attacks.restarts import Restarts as Restarts
