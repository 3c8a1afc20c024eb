"""Cheap logit-regularised training and the attacks that test it.

The public names stand in `__init__.pyi`. Each is imported when it is first used, so that `import
logit_reg` does not start TensorFlow.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
