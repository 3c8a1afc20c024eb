"""The audit: every accepted diagnostic of a robustness claim, and a verdict with its evidence."""

from logit_reg.audit.binarization import Binarization as Binarization
from logit_reg.audit.binarization import binarization_test as binarization_test
from logit_reg.audit.evidence import Control as Control
from logit_reg.audit.records import Audit as Audit
from logit_reg.audit.records import Cost as Cost
from logit_reg.audit.records import Curve as Curve
from logit_reg.audit.records import SqueezeDiagnostics as SqueezeDiagnostics
from logit_reg.audit.records import TestRecord as TestRecord
from logit_reg.audit.records import WorstCase as WorstCase
from logit_reg.audit.run import audit as audit
