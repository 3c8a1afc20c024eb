from .run import AttackRecord as AttackRecord
from .run import Evaluation as Evaluation
from .run import ThreatModelError as ThreatModelError
from .run import evaluate as evaluate
from .run import predict as predict
