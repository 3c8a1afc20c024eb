"""Training: the model whose `train_step` regularises logits, its adversaries and the loop.

The names that users need stand in `__init__.pyi`. Each is imported when it is first used, so that
importing this package does not start TensorFlow.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
