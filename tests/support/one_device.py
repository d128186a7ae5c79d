"""Proof without a GPU that a step stays on its device: it is run on the meta device, where every tensor has a place and
none has values, under a mode that refuses what would make an accelerator wait or a CUDA graph impossible to capture."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OnMeta(TorchDispatchMode):
    """Refuses any tensor that is not on the meta device, hence every copy to it, and boolean masks as an index. A value
    that Python asks for (`.item()`, `bool(tensor)`, `nonzero`) is refused by the device itself."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == "meta", f"{func} has a tensor of {tuple(leaf.shape)} on {leaf.device}"
        if func._opname in ("index", "index_put", "index_put_"):  # type: ignore[attr-defined]
            assert not any(index.dtype == torch.bool for index in args[1] if index is not None)
        return result
