"""A worker group's state on disk: whole tensors in safetensors, shared out over the ranks, and where the run stands.

    rank-00-of-02.safetensors   every second parameter: value, exp_avg, exp_avg_sq; on rank 0 the buffers too
    checkpoint.json             written by rank 0: step, ranks, the names that all files together hold, the config

Frozen parameters are not in it. Since tensors are whole, any number of workers can go on from it.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aptp_platform.config import ConfigError
from aptp_platform.run.facts import differences
from aptp_platform.storage.errors import DamagedError
from aptp_platform.train.engine import restore_moments, trainable, whole_state

_INDEX = "checkpoint.json"


def save_checkpoint(engine: Any, folder: Path, step: int, config: Mapping[str, Any]) -> None:
    """Write this rank's part of the state after `step` steps; every rank calls it, each with a folder of its own.

    Args:
        config: what the run depends on, as plain data; only a run with the same one may go on from here.
    """
    rank, ranks = engine.global_rank, engine.world_size
    part: dict[str, Tensor] = {}
    names = []
    for number, (name, state) in enumerate(whole_state(engine)):
        names += [f"{key}/{name}" for key in state]
        if number % ranks == rank:
            part |= {f"{key}/{name}": tensor.detach().cpu().clone() for key, tensor in state.items()}
    buffers = {f"buffer/{name}": tensor.cpu().clone() for name, tensor in _buffers(engine.module).items()}
    if rank == 0:
        part |= buffers
        index = {"step": step, "ranks": ranks, "names": [*names, *buffers], "config": dict(config)}
        (folder / _INDEX).write_text(json.dumps(index))
    save_file(part, folder / _file(rank, ranks))


class Restored:
    """A whole checkpoint, open for reading.

    Raises:
        ConfigError: it was written under another config (what differs is named), or after more steps than are wanted.
        DamagedError: a part of it is missing or does not read.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._open = ExitStack()
        try:
            index = json.loads((folder / _INDEX).read_text())
        except (OSError, ValueError) as error:
            raise _damaged(folder, f"{_INDEX} does not read: {error}") from None
        if found := differences(index["config"], dict(config)):
            raise ConfigError(
                f"{folder}: this checkpoint belongs to another config ({'; '.join(found[:3])}): give the run a "
                "root of its own, or start the stage anew with --restart"
            )
        self.step: int = index["step"]
        self.ranks: int = index["ranks"]
        self._files: dict[str, Any] = {}
        for rank in range(self.ranks):
            path = folder / _file(rank, self.ranks)
            if path.is_file():
                try:
                    opened = self._open.enter_context(safe_open(path, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise _damaged(folder, f"{path.name} does not read: {error}") from None
                self._files |= dict.fromkeys(opened.keys(), opened)
        if missing := sorted(set(index["names"]) - set(self._files)):
            raise _damaged(folder, f"a part is missing: {len(missing)} tensors, {missing[0]} first")

    def __enter__(self) -> "Restored":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Values and buffers; before an engine is built on the module."""
        for name, parameter in trainable(module).items():
            parameter.copy_(self._tensor("value", name))
        for name, buffer in _buffers(module).items():
            buffer.copy_(self._tensor("buffer", name))

    def fill_moments(self, engine: Any) -> None:
        """The optimizer's memory; into an engine built on a filled module."""
        restore_moments(engine, self._tensor, self.step)

    def _tensor(self, kind: str, name: str) -> Tensor:
        key = f"{kind}/{name}"
        return self._files[key].get_tensor(key)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def _damaged(folder: Path, why: str) -> DamagedError:
    return DamagedError(
        f"{folder}: this checkpoint is damaged ({' '.join(why.split())[:200]}): bring it back from a copy, or start "
        "the stage anew with --restart"
    )


def _file(rank: int, ranks: int) -> str:
    return f"rank-{rank:02d}-of-{ranks:02d}.safetensors"
