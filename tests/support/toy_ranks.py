"""Ranks as plain processes: a toy trained by the engine, undisturbed and across a checkpoint."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import ops
from deepspeed.comm import comm
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from aptp_platform.config import EngineConfig, TrainingConfig
from aptp_platform.train.checkpoint import Restored, save_checkpoint
from aptp_platform.train.engine import build_engine, set_learning_rate, whole_state
from aptp_platform.train.loop import gather_rows
from tests.support.toy_spec import ToyModule

CONFIG = {"seed": 0, "prune": {"batch_size": 4}}


class GlobalLoss(ToyModule):
    """The toy's parameters under a loss that only the whole batch has."""

    def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]  # the toy without a batch
        everybody = gather_rows(self.linear(self.frozen(rows)) @ self.codes)
        return (everybody.std(0).log().square() + everybody.mean(0).square()).sum()


def run_ranks(ranks: int, stages: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """For each ZeRO stage: losses of 4 steps, of 2 and 2 across a checkpoint, and the values at the end."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, (ranks, stages, port, folder), nprocs=ranks)
    found: list[dict[str, Any]] = torch.load(folder / "found.pt", weights_only=True)
    return found


def _rank(rank: int, ranks: int, stages: tuple[Any, ...], port: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # Ray sets it, DeepSpeed asks for it
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    found: list[dict[str, Any]] = []
    for stage in stages:
        training = TrainingConfig(
            batch_size=4, learning_rate=1e-2, warmup_steps=3, engine=EngineConfig(zero_stage=stage)
        )
        undisturbed = _losses(build_engine(GlobalLoss(), training), training, 0, 4)
        engine = build_engine(GlobalLoss(), training)
        resumed = _losses(engine, training, 0, 2)
        checkpoint = folder / f"stage-{stage}"
        checkpoint.mkdir(exist_ok=True)
        save_checkpoint(engine, checkpoint, 2, CONFIG)
        dist.barrier()
        with Restored(checkpoint, CONFIG) as restored:
            module = GlobalLoss()
            restored.fill(module)
            engine = build_engine(module, training)
            restored.fill_moments(engine)
            resumed += _losses(engine, training, restored.step, 4)
        values = {name: state["value"].clone() for name, state in whole_state(engine, moments=False)}
        found.append({"undisturbed": undisturbed, "resumed": resumed, "values": values})
        found[-1] |= {"compiled": comm.cdb.shm_comm_op is not None, "table": vars(ops).get("__compatible_ops__")}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _losses(engine: Any, training: TrainingConfig, start: int, stop: int) -> list[float]:
    """Four rows a step, whatever the number of ranks."""
    losses = []
    for step in range(start, stop):
        rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        set_learning_rate(engine, training, step)
        loss = engine(rows.chunk(dist.get_world_size())[dist.get_rank()])
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses
