"""Weights in the layout that the CPU's matrix kernels read, made once at a replica's start.

Plain PyTorch lays them out anew at every call, which for the few rows of a small batch is a fifth of a denoising step.
The same kernels with weights packed ahead are what `torch.compile` freezes a graph to; here no graph is compiled, so a
replica starts in seconds and every batch and image size runs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

_IMAGE: Final = (2, 32, 32)  # rows, height and width that the layout is chosen for; it hardly depends on them
_ROWS: Final = 256


class PackedConv2d(nn.Module):
    """A convolution without gradients, equal to its source up to rounding."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(source.padding, str)
        self._geometry = (list(source.padding), list(source.stride), list(source.dilation), source.groups)
        count, *size = _IMAGE
        shape = (count, source.in_channels, *size)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(source.weight.detach(), *self._geometry, shape)
        self._bias = None if source.bias is None else source.bias.detach()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._weight, self._bias, *self._geometry, "none", [], ""
        )
        return result


class PackedLinear(nn.Module):
    """A linear map without gradients, equal to its source up to rounding."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(source.weight.detach(), _ROWS)
        self._bias = None if source.bias is None else source.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return result


def pack_weights(module: nn.Module) -> None:
    """Replaces the module's convolutions and linear maps, in place. It must stay on its device, and cannot be saved.

    What has no packed kernel is left as it is: other devices, half precision, a build of PyTorch without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and _packs(child.weight) and _is_plain(child):
                setattr(parent, name, PackedConv2d(child))
            elif type(child) is nn.Linear and _packs(child.weight):
                setattr(parent, name, PackedLinear(child))


def _packs(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
