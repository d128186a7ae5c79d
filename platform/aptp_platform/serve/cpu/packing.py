"""Weights in the layout that the CPU's matrix kernels read, made once at a replica's start.

Plain PyTorch lays them out anew at every call, which for the few rows of a small batch is a fifth of a denoising step.
The same kernels with weights packed ahead are what `torch.compile` freezes a graph to; here no graph is compiled, so a
replica starts in seconds and every batch and image size runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

_ROWS: Final = 256  # that a linear map's layout is chosen for; it hardly depends on them
_FEW_PIXELS: Final = 16  # of an image, up to which a convolution is faster as a matrix product over its patches
_MANY_PIXELS: Final = 1024  # of a batch, from which laying out the weights anew is nothing beside their use
_TRIALS: Final = 3  # of each way; the least counts, the first being slow
_LOG = logging.getLogger("ray.serve")


class PackedConv2d(nn.Module):
    """A convolution without gradients, equal to its source up to rounding.

    The layout that is fastest depends on the size of the images, and any other than the kernel's choice is slower than
    a plain one: images of another size than `shape`'s go through the source, and so do batches of many pixels.
    """

    def __init__(self, source: nn.Conv2d, shape: torch.Size) -> None:
        super().__init__()
        assert not isinstance(source.padding, str)
        self.source, self._size = source, shape[1:]
        self._geometry = (list(source.padding), list(source.stride), list(source.dilation), source.groups)
        weight = source.weight.detach()
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, list(shape))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self._size or images.shape[0] * self._size[1:].numel() >= _MANY_PIXELS:
            return self.source(images)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._weight, self.source.bias, *self._geometry, "none", [], ""
        )
        return result


class PatchConv2d(nn.Module):
    """A convolution of one group, without dilation and gradients, as a linear map of each pixel's patch.

    The matrix kernels fill their registers with pixels of the whole batch, those for convolutions with one image's: of
    the deepest feature maps, 2 x 2 or 4 x 4, that leaves half of them empty. Larger images go through the source.
    """

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        assert _fits_patches(source)
        assert not isinstance(source.padding, str)
        self.source, (above, beside) = source, source.padding
        self._weight = _packed(source.weight.permute(0, 2, 3, 1).flatten(1))
        self._padding = [0, 0, beside, beside, above, above]

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride = self.source.kernel_size, self.source.stride
        borders = self._padding[-2], self._padding[2]
        sides = zip(images.shape[2:], borders, kernel, stride, strict=True)
        height, width = ((side + 2 * border - reach) // step + 1 for side, border, reach, step in sides)
        if height * width > _FEW_PIXELS:
            return self.source(images)
        padded = pad(images.permute(0, 2, 3, 1), self._padding).contiguous()
        row, y, x, _ = padded.stride()
        patches = padded.as_strided(
            (len(images), height, width, *kernel, images.shape[1]), (row, y * stride[0], x * stride[1], y, x, 1)
        ).reshape(len(images) * height * width, -1)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(patches, self._weight, self.source.bias, "none", [], "")
        return result.view(len(images), height, width, -1).permute(0, 3, 1, 2).contiguous()


class PackedLinear(nn.Module):
    """A linear map without gradients, equal to its source up to rounding."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self._weight = _packed(source.weight)
        self._bias = None if source.bias is None else source.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return result


def pack_if_faster(name: str, modules: Iterable[nn.Module], trial: Callable[[], Any], *, seconds: float) -> bool:
    """Packs the modules' weights, in place, if `trial` is faster with them; the log says which, and by how much.

    CPU seconds decide: other replicas that start at the same time have the cores as well. What has no packed kernel is
    left as it is, and nothing is measured: other devices, half precision, a build of PyTorch without oneDNN.

    Args:
        name: of the model, in the log.
        trial: runs the modules once as they will mostly be run.
        seconds: what the comparison may take; both ways are timed at least once.
    """
    weights = PackedWeights.of(modules, trial)
    if weights is None:
        return False
    ends = time.monotonic() + seconds
    plain_s: list[float] = []
    packed_s: list[float] = []
    while len(plain_s) < _TRIALS and (not plain_s or time.monotonic() < ends):
        packed_s.append(_cpu_s(trial))
        weights.unpack()
        plain_s.append(_cpu_s(trial))
        weights.pack()
    plain, packed = min(plain_s), min(packed_s)
    if packed >= plain:
        weights.unpack()
    chosen = "packed" if packed < plain else "plain"
    _LOG.info("%s has %s weights: packed %.4f CPU s, plain %.4f", name, chosen, packed, plain)
    return packed < plain


class PackedWeights:
    """Convolutions and linear maps with what stands for them packed: `pack` and `unpack` put the one or the other in
    place. The modules must stay on their device, and not be saved while they are packed.

    Args:
        places: each with the module that has it, its name there, its own child and the packed one.
    """

    def __init__(self, places: Sequence[tuple[nn.Module, str, nn.Module, nn.Module]]) -> None:
        self._places = places
        self.pack()

    @staticmethod
    def of(modules: Iterable[nn.Module], trial: Callable[[], Any]) -> PackedWeights | None:
        """The modules, packed now, or None if nothing in them can be.

        Args:
            trial: runs the modules; convolutions are packed for the sizes that they meet.
        """
        if not torch.backends.mkldnn.is_available():
            return None
        places = [
            (parent, name, child)
            for module in modules
            for parent in module.modules()
            for name, child in parent.named_children()
            if type(child) in (nn.Linear, nn.Conv2d) and _packs(child)
        ]
        if not places:
            return None
        shapes: dict[nn.Module, torch.Size] = {}
        hooks = [
            child.register_forward_pre_hook(lambda module, inputs: shapes.__setitem__(module, inputs[0].shape))
            for _, _, child in places
        ]
        trial()
        for hook in hooks:
            hook.remove()
        packed = [(parent, name, child, _packed_child(child, shapes)) for parent, name, child in places]
        return PackedWeights(packed)

    def pack(self) -> None:
        for parent, name, _, packed in self._places:
            setattr(parent, name, packed)

    def unpack(self) -> None:
        for parent, name, source, _ in self._places:
            setattr(parent, name, source)


def _cpu_s(trial: Callable[[], Any]) -> float:
    started = time.process_time()
    trial()
    return time.process_time() - started


def _packed_child(source: nn.Module, shapes: Mapping[nn.Module, torch.Size]) -> nn.Module:
    if isinstance(source, nn.Linear):
        return PackedLinear(source)
    if isinstance(source, nn.Conv2d) and source in shapes:
        return _packed_convolution(source, shapes[source])
    return source


def _packed_convolution(source: nn.Conv2d, shape: torch.Size) -> nn.Module:
    down, right = source.stride
    if shape[-2] * shape[-1] <= _FEW_PIXELS * down * right and _fits_patches(source):
        return PatchConv2d(source)
    if source.kernel_size == (1, 1):  # the plain kernel reads their few weights as they are
        return source
    return PackedConv2d(source, shape)


def _fits_patches(source: nn.Conv2d) -> bool:
    return source.groups == 1 and source.dilation == (1, 1)


def _packed(weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    return result


def _packs(module: Any) -> bool:
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
