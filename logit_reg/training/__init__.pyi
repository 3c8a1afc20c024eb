from .adversaries.free import FreeAdversary as FreeAdversary
from .adversaries.pgd import PGDAdversary as PGDAdversary
from .feeding import replayed as replayed
from .model import RegularizedModel as RegularizedModel
