"""Models of other frameworks as a `logits_fn`, for attacks, `evaluate` and `audit`."""

import collections
import hashlib
import itertools
import random
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from logit_reg.files import one_line

# Passes whose random numbers are kept, in case their gradient is asked for after another pass.
_MOST_STATES = 256

Pullback = Callable[[np.ndarray], np.ndarray]
"""Gradient of the logits (N, K) -> gradient of the images (N, H, W, C), float32 arrays both."""


class Framework(Protocol):
    """A network of another framework, in numpy."""

    def forward(self, images: np.ndarray) -> tuple[np.ndarray, Pullback]:
        """One pass.

        Args:
            images: (N, H, W, C) float32, pixel units.

        Returns:
            (N, K) float32 logits, and their gradient; it may be asked for more than once.
        """
        ...

    def random_state(self) -> Any:
        """What the random numbers of the next pass come from."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Go back to an earlier `random_state`."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of the network's content, for the records of evaluations."""
        ...


class ForeignNetwork:
    """A network of another framework as a `logits_fn`, with the gradient of its images."""

    def __init__(self, network: Framework, name: str):
        """Adapt a network.

        Args:
            network: one pass and its gradient, in numpy.
            name: for messages.
        """
        self._network, self._name = network, name
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._states: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._latest: tuple[int, Pullback] | None = None
        self._num_classes: dict[tuple, int] = {}

    def __repr__(self):
        return f"{type(self).__name__}({self._name})"

    @property
    def sha256(self) -> str:
        """Hash of the network's content now; see `logit_reg.evaluation.run.network_hash`."""
        return self._network.sha256

    def __call__(self, images):
        """Logits of images, inside a `tf.function` or outside.

        Args:
            images: (N, H, W, C) float, pixel units.

        Returns:
            (N, K) float32, differentiable once.

        Raises:
            ValueError: if the network does not take such images, or does not return logits.
        """
        images = tf.cast(tf.convert_to_tensor(images), tf.float32)
        shape = images.shape[1:]
        num_classes = self._classes_for(tuple(shape)) if shape.is_fully_defined() else None

        @tf.custom_gradient
        def run(images):
            outputs = (tf.float32, tf.int64)
            logits, number = tf.numpy_function(self._forward, [images], outputs)
            logits = tf.ensure_shape(logits, (images.shape[0], num_classes))

            def gradient(upstream):
                inputs = [images, upstream, number]
                found = tf.numpy_function(self._gradient, inputs, tf.float32)
                return tf.ensure_shape(found, images.shape)

            return logits, gradient

        return run(images)

    def _forward(self, images):
        with self._lock:
            number = next(self._numbers)
            self._states[number] = self._network.random_state()
            if len(self._states) > _MOST_STATES:
                self._states.popitem(last=False)
            logits, pullback = self._network.forward(images)
            self._latest = number, pullback
        return logits, np.int64(number)

    def _gradient(self, images, upstream, number):
        with self._lock:
            if self._latest is None or self._latest[0] != number:
                # Another pass came between: this one again, with the random numbers that it had.
                self._latest = int(number), self._again(images, int(number))
            return self._latest[1](upstream)

    def _again(self, images, number):
        now = self._network.random_state()
        self._network.set_random_state(self._states[number])
        try:
            return self._network.forward(images)[1]
        finally:
            self._network.set_random_state(now)

    def _classes_for(self, shape):
        """K, from a pass of two black images of a shape (H, W, C)."""
        if shape not in self._num_classes:
            with self._lock:
                now = self._network.random_state()
                try:
                    logits, _ = self._network.forward(np.zeros((2, *shape), np.float32))
                except Exception as error:
                    raise ValueError(
                        f"{self._name} fails on images (H, W, C) = {shape}, which it is given as "
                        f"(N, C, H, W): {one_line(error)}"
                    ) from error
                finally:
                    self._network.set_random_state(now)
            if logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < 2:
                raise ValueError(
                    f"{self._name} must return (N, K) logits with K >= 2; for 2 images it returns "
                    f"shape {logits.shape}."
                )
            self._num_classes[shape] = logits.shape[1]
        return self._num_classes[shape]


def from_torch(module: Any, *, eval_mode: bool = True) -> ForeignNetwork:
    """A PyTorch module as a `logits_fn`: `evaluate(from_torch(module), ...)`.

    The module computes on its own device and in its own precision; images are given to it as
    (N, C, H, W), and what it returns comes back in float32. The gradient of the images is PyTorch's
    own, of the very pass that gave the logits. Weights that change later are followed.

    Args:
        module: (N, C, H, W) images, in the pixel units that evaluations use, -> (N, K) logits; a
            dictionary or list of one output counts as that output.
        eval_mode: put the module, and keep it, in evaluation mode (`module.eval()`); with False
            its modes stay as they are, for dropout that is to be random, say.

    Returns:
        A function of images (N, H, W, C) in TensorFlow. The module is tried on two black images
        when the function first meets a shape.

    Raises:
        ModuleNotFoundError: if PyTorch is not installed.
        ValueError: if this is no PyTorch module.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            f"from_torch needs a torch.nn.Module from images to logits; got "
            f"{'a class' if isinstance(module, type) else type(module).__name__}."
        )
    name = type(module).__name__
    if eval_mode and module.training:
        warnings.warn(
            f"{name} was in training mode; it is put in evaluation mode and stays there "
            "(from_torch(module, eval_mode=False) leaves it).",
            stacklevel=2,
        )
        module.eval()
    return ForeignNetwork(_TorchNetwork(module, eval_mode), name)


class _TorchNetwork:
    """A `Framework` of a PyTorch module."""

    def __init__(self, module, eval_mode):
        import torch

        self._module, self._eval_mode = module, eval_mode
        kinds = torch.nn.modules.batchnorm._BatchNorm
        moving = [part for part in module.modules() if isinstance(part, kinds) and part.training]
        if moving and not eval_mode:
            warnings.warn(
                f"{len(moving)} normalisation layers are in training mode: every pass moves their "
                "statistics, and verdicts depend on the batch. Call module.eval(), then train() of "
                "what is meant to be random alone.",
                stacklevel=3,
            )

    def forward(self, images):
        import torch

        if self._eval_mode and any(part.training for part in self._module.modules()):
            self._module.eval()
        like = self._tensor()
        points = torch.tensor(
            np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
            dtype=like.dtype if like.is_floating_point() else torch.float32,
            device=like.device,
        ).requires_grad_()
        with torch.enable_grad():
            logits = _only_tensor(self._module(points)).float()

        def pullback(upstream):
            upstream = torch.tensor(upstream, device=logits.device)
            gradient = None
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(
                    logits, points, upstream, retain_graph=True, allow_unused=True
                )
            # A module that cuts the gradient has none, as in TensorFlow.
            gradient = torch.zeros_like(points) if gradient is None else gradient
            return gradient.permute(0, 2, 3, 1).float().contiguous().cpu().numpy()

        return logits.detach().cpu().numpy(), pullback

    def random_state(self):
        import torch

        device = self._tensor().device
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return torch.get_rng_state(), of_device, np.random.get_state(), random.getstate()

    def set_random_state(self, state):
        import torch

        of_torch, of_device, of_numpy, of_python = state
        torch.set_rng_state(of_torch)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, self._tensor().device)
        np.random.set_state(of_numpy)
        random.setstate(of_python)

    @property
    def sha256(self):
        import torch

        # The layers with their settings, then what they hold.
        digest = hashlib.sha256(f"{type(self._module).__qualname__} {self._module}".encode())
        for name, value in self._module.state_dict().items():
            digest.update(name.encode())
            if not isinstance(value, torch.Tensor):
                digest.update(repr(value).encode())
                continue
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _tensor(self):
        """A tensor of the device and precision that the module computes in."""
        import torch

        tensors = [*self._module.parameters(), *self._module.buffers()]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        return (floating or tensors or [torch.zeros(())])[0]


def _only_tensor(result):
    """The one tensor that a module returns, out of a dictionary or list of one."""
    parts = [result]
    if isinstance(result, Mapping):
        parts = list(result.values())
    elif isinstance(result, list | tuple):
        parts = list(result)
    if len(parts) != 1 or not hasattr(parts[0], "requires_grad"):
        shown = ", ".join(map(str, result)) if isinstance(result, Mapping) else len(parts)
        raise ValueError(
            f"it must return logits alone, one tensor; it returns {type(result).__name__} "
            f"({shown}): wrap it in a module that returns the logits"
        )
    return parts[0]
