"""Makes an unmodified model obey architecture masks, per sample and differentiably; leaving it leaves no trace.

A width mask multiplies the input of the layer that consumes the gated channels: for bits this equals slicing exactly,
and for soft values the gradient reaches the gate (a mask before a GroupNorm would be normalised away).

A closed depth gate bypasses its layer but does not spare it. In training it must not: the gradient of a gate at exactly
zero (straight-through bits) is <g, f(x) - x>, which needs f(x), and rows of one batch close different gates. At
inference it could, for a wait of the host on every mask and a compiled graph that depends on the mask's values; there
`aptp.slicing` removes the layer instead, and every narrower one with it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from aptp.backbones import backbone_of
from aptp.codes import PruningSpace, Site
from aptp.sites import check_space, identity


class _Values(NamedTuple):
    """One mask, spread to the channels of every width site (batch, channel) and to the depth sites (batch, 1)."""

    width: tuple[Tensor, ...]
    depth: tuple[Tensor, ...]


class Gates:
    """The gates of one model while `gated` is on: open at first."""

    def __init__(self, model: nn.Module, space: PruningSpace) -> None:
        self._model = model
        self._space = space
        self._values: _Values | None = None
        self._attached = False

    def open(self) -> None:
        """Run the stock model: no gate is applied at all."""
        self._values = None

    def set(self, mask: Float[Tensor, "batch gate"]) -> None:
        """Apply one mask per sample, entries in [0, 1], until the next `set` or `open`.

        A model batch that is a multiple of the mask's (classifier-free guidance stacks [uncond, cond]) tiles it; a mask
        of one row serves every sample. ValueError for a mask that does not have D columns.
        """
        if mask.ndim != 2 or mask.shape[1] != len(self._space):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)}: this space takes (batch, {len(self._space)}), one row per sample"
            )
        spread = mask.index_select(1, _entry_of_channel(self._space, mask.device))
        self._values = _Values(
            width=torch.split_with_sizes(spread, [site.channels for site in self._space.width], dim=1),
            depth=torch.unbind(mask[:, self._space.width_entries :, None], dim=1),
        )

    @contextmanager
    def _attach(self) -> Iterator[None]:
        with ExitStack() as handles:
            for i, site in enumerate(self._space.width):
                consumer = self._model.get_submodule(site.name)
                handles.enter_context(consumer.register_forward_pre_hook(self._width_hook(i, site)))
            for i, site in enumerate(self._space.depth):
                bypassed = self._model.get_submodule(site.name)
                handles.enter_context(bypassed.register_forward_hook(self._depth_hook(i, site)))
            self._attached = True
            handles.callback(self.__setattr__, "_attached", False)
            yield

    def _width_hook(self, index: int, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            if self._values is None:
                return None
            channel_dim = 1 if isinstance(module, nn.Conv2d) else -1
            return (args[0] * _fitted(self._values.width[index], args[0], channel_dim, site),)

        return hook

    def _depth_hook(self, index: int, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._values is None:
                return None
            kept = output[0] if isinstance(output, tuple) else output
            gate = _fitted(self._values.depth[index], kept, 1, site)
            blend = torch.lerp(identity(site, args[0]).to(kept.dtype), kept, gate)
            return (blend,) if isinstance(output, tuple) else blend

        return hook


@lru_cache(maxsize=16)
def _entry_of_channel(space: PruningSpace, device: torch.device) -> Int[Tensor, " channel"]:
    """The entry of the architecture vector for each channel of all width sites. It is kept: a training step that built
    it again would wait for the copy to the device, and could not be captured in a CUDA graph."""
    with torch.inference_mode(False):  # the next caller may want gradients
        units = torch.tensor([site.channels_per_unit for site in space.width for _ in range(site.units)])
        return torch.arange(len(units)).repeat_interleave(units.long()).to(device)


def _fitted(gate: Float[Tensor, "batch channel"], target: Tensor, channel_dim: int, site: Site) -> Tensor:
    """The gate in the target's type, batch and number of axes."""
    batch, masks = target.shape[0], gate.shape[0]
    if masks not in (1, batch):
        if batch % masks:
            raise ValueError(
                f"site {site.name!r}: a batch of {batch} under {masks} masks; set one mask per sample, "
                "or a divisor of the batch (the masks are then tiled)"
            )
        gate = gate.repeat(batch // masks, 1)
    shape = [1] * target.ndim
    shape[0], shape[channel_dim] = gate.shape
    return gate.view(shape).to(target.dtype)


class _Recomputation:
    """Gradient checkpointing that recomputes under the gates of the forward pass, whatever they are by then."""

    def __init__(self, gates: Gates, original: Callable[..., Any]) -> None:
        self._gates = gates
        self.original = original

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        gates, values = self._gates, self._gates._values

        def under_the_same_gates(*inputs: Any) -> Any:
            current = gates._values
            with ExitStack() as stack:
                if not gates._attached:
                    stack.enter_context(gates._attach())
                gates._values = values
                try:
                    return function(*inputs)
                finally:
                    gates._values = current

        return self.original(under_the_same_gates, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return self.original  # a copy of the model is not gated


@contextmanager
def gated(unet: nn.Module, space: PruningSpace) -> Iterator[Gates]:
    """Within the block `unet` obeys the yielded `Gates`; afterwards it is as before.

    Enter before compiling: `torch.compile` reads the hooks once. ValueError when the space was read from another model.
    """
    check_space(unet, space)
    if getattr(unet, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "this model is compiled already and would not see its gates: compile it inside the gated block"
        )
    gates = Gates(unet, space)
    with ExitStack() as stack:
        stack.enter_context(gates._attach())
        for module in unet.modules():
            original = module.__dict__.get("_gradient_checkpointing_func")
            if original is not None:
                module.__dict__["_gradient_checkpointing_func"] = _Recomputation(gates, original)
                stack.callback(module.__dict__.__setitem__, "_gradient_checkpointing_func", original)
        yield gates


@contextmanager
def block_features(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the hidden outputs of every block (down blocks, middle, up blocks) of the latest forward pass.

    The yielded list is emptied when the next pass begins: keep `list(features)` of the one you need.
    """
    blocks = [unet.get_submodule(path) for path in backbone_of(unet).blocks(unet)]
    features: list[Tensor] = []

    def begin(module: nn.Module, args: Any) -> None:
        features.clear()

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        if len(features) < len(blocks):  # a recomputed block comes after the last
            features.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as handles:
        handles.enter_context(unet.register_forward_pre_hook(begin))
        for block in blocks:
            handles.enter_context(block.register_forward_hook(collect))
        yield features
