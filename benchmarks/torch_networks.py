"""The exported networks in PyTorch, channels last throughout: its faster order on a CPU."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# Of the CIFAR-10 challenge's network; see `madry_compat.networks.wide_resnet`.
_LEAKY_SLOPE = 0.1
_BATCH_NORM_EPSILON = 1e-3
_NUM_GROUPS = 3
_UNITS_PER_GROUP = 5


def build(arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """A network with the weights of a Keras one, in evaluation mode, its weights frozen.

    Args:
        arrays: what `networks.export` gave.

    Returns:
        Images (N, C, H, W) in pixel units -> logits (N, 10).
    """
    plan = [str(step) for step in arrays["plan"]]
    if plan == ["wide_resnet"]:
        network: nn.Module = _WideResnet(arrays)
    else:
        network = nn.Sequential(_ChannelsLast(), *_chain(plan, arrays))
    network = network.to(memory_format=torch.channels_last).eval()
    # Only the images need gradients.
    return network.requires_grad_(False)


def _chain(plan, arrays):
    for step in plan:
        kind, *options = step.split()
        if kind == "pool":
            yield nn.MaxPool2d(2)
        elif kind == "flatten":
            yield _FlattenChannelsLast()
        else:
            name, *padding, activation = options
            weight = torch.from_numpy(arrays[f"{name}/kernel"])
            bias = torch.from_numpy(arrays[f"{name}/bias"])
            yield _convolution(weight, bias, *padding) if kind == "conv" else _dense(weight, bias)
            if activation == "relu":
                yield nn.ReLU()


def _convolution(weight, bias, padding):
    height, width, in_channels, out_channels = weight.shape
    layer = nn.Conv2d(in_channels, out_channels, (height, width), padding=padding)
    layer.weight = nn.Parameter(weight.permute(3, 2, 0, 1).contiguous())
    layer.bias = nn.Parameter(bias)
    return layer


def _dense(weight, bias):
    layer = nn.Linear(*weight.shape)
    layer.weight.data, layer.bias.data = weight.T.contiguous(), bias
    return layer


class _ChannelsLast(nn.Module):
    def forward(self, images):
        return images.contiguous(memory_format=torch.channels_last)


class _FlattenChannelsLast(nn.Module):
    """Keras' order of values; no copy where channels are last in memory."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


class _WideResnet(nn.Module):
    """The CIFAR-10 challenge's network in evaluation mode."""

    def __init__(self, arrays):
        super().__init__()
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if "/" in name}
        for name, tensor in tensors.items():
            if tensor.ndim == 4:
                tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            self.register_buffer(name.replace("/", "_"), tensor)

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / deviation.clamp_min(x[0].numel() ** -0.5)
        x = self._convolve(x, "input_init_conv")
        for group in range(1, _NUM_GROUPS + 1):
            for unit in range(_UNITS_PER_GROUP):
                x = self._unit(x, f"unit_{group}_{unit}", is_first=unit == 0, group=group)
        x = self._activate(x, "unit_last_bn").mean(dim=(2, 3))
        return x @ self.logits_kernel + self.logits_bias

    def _unit(self, x, name, *, is_first, group):
        stride = 2 if is_first and group > 1 else 1
        activated = self._activate(x, f"{name}_bn1")
        shortcut = activated if is_first and group == 1 else x
        x = self._convolve(activated, f"{name}_conv1", stride)
        x = self._convolve(self._activate(x, f"{name}_bn2"), f"{name}_conv2")
        if stride > 1:
            shortcut = functional.avg_pool2d(shortcut, stride)
        extra = (x.shape[1] - shortcut.shape[1]) // 2
        return x + functional.pad(shortcut, (0, 0, 0, 0, extra, extra))

    def _convolve(self, x, name, stride=1):
        kernel = getattr(self, f"{name}_kernel")
        if stride == 1:
            return functional.conv2d(x, kernel, padding=1)
        # TensorFlow's "same" pads an even size below and on the right only.
        return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), kernel, stride=stride)

    def _activate(self, x, name):
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        mean, variance, scale, shift = (getattr(self, f"{name}_{part}") for part in names)
        x = functional.batch_norm(x, mean, variance, scale, shift, eps=_BATCH_NORM_EPSILON)
        return functional.leaky_relu(x, _LEAKY_SLOPE)
