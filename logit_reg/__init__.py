"""Cheap logit-regularised training and the attacks that test it. Imports nothing from
`madry_compat`.
"""

from logit_reg.version import __version__ as __version__
