"""The DeepSpeed engine of a worker group: typed settings in, an engine out, and its state tensor by tensor.

Only this file names ZeRO. Whatever is partitioned, the state comes out as whole tensors by parameter name: what one
number of workers saved, another can load.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from aptp_platform.config import ConfigError, TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's memory of a parameter, beside the number of steps


def check_engine(training: TrainingConfig, where: str) -> None:
    """ConfigError for settings that exclude each other; `where` is the section, such as "prune.run"."""
    engine = training.engine
    if engine.offload and engine.zero_stage == 0:
        raise ConfigError(
            f"{where}.engine.offload: true: needs a partitioned optimizer; set {where}.engine.zero_stage to 1, 2 or 3"
        )
    if engine.offload and not training.gpus_per_worker:
        raise ConfigError(
            f"{where}.engine.offload: true: moves the optimizer from the GPU to the CPU, but "
            f"{where}.gpus_per_worker is 0; set one of the two"
        )
    if engine.gradient_accumulation < 1:
        raise ConfigError(
            f"{where}.engine.gradient_accumulation: {engine.gradient_accumulation}: must be at least 1 (1: every batch "
            "is a step)"
        )
    if engine.gradient_clipping < 0:
        raise ConfigError(
            f"{where}.engine.gradient_clipping: {engine.gradient_clipping}: must be at least 0 (0: no clipping)"
        )


def build_engine(module: nn.Module, training: TrainingConfig) -> Any:
    """A DeepSpeed engine over the parameters of `module` that require gradients, on the process group that is there."""
    settings = training.engine
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
    )
    with _nothing_compiled():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": training.batch_size // dist.get_world_size(),
                "gradient_accumulation_steps": settings.gradient_accumulation,
                "gradient_clipping": settings.gradient_clipping,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**62,
            },
        )
    return engine


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Lets DeepSpeed start without its own all-reduce for CPUs, which its first start on a node would compile.

    The optimizer is torch's own and gloo reduces, so a node that trains needs no compiler, and a worker starts half a
    minute earlier. DeepSpeed 0.19 has no setting for it: it compiles what this table says can be.
    """
    kept = vars(deepspeed.ops).get("__compatible_ops__")  # it is filled, by trying compilers, when first asked for
    deepspeed.ops.__compatible_ops__ = {}
    try:
        yield
    finally:
        if kept is None:
            del deepspeed.ops.__compatible_ops__
        else:
            deepspeed.ops.__compatible_ops__ = kept


def runs_on_all_ranks_only(training: TrainingConfig) -> bool:
    """Whether a network can be run by all ranks together alone: ZeRO 3 parts its parameters among them."""
    return training.engine.zero_stage == 3


def set_learning_rate(engine: Any, training: TrainingConfig, step: int) -> None:
    """What `learning_rate_at` says of this step, for all weights."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate_at(training, step)


def learning_rate_at(training: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to the last step's: a function of the step alone."""
    rate, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return rate * (step + 1) / warmup
    if (final := training.final_learning_rate) is None:
        return rate
    done = (step - warmup) / max(training.steps - 1 - warmup, 1)
    return final + (rate - final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def compute_in(network: nn.Module, precision: str) -> None:
    """Let a network's forward pass run in `precision`; what surrounds it, and the weights, stay in fp32."""
    if precision == "fp32":
        return
    entered: list[Any] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        device = next(module.parameters()).device.type
        entered.append(torch.autocast(device, torch.bfloat16))
        entered[-1].__enter__()

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    network.register_forward_pre_hook(enter)
    network.register_forward_hook(leave, always_call=True)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def whole_state(engine: Any, *, moments: bool = True) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each trained parameter's name, fp32 value ("value") and moments, whole; every rank must go through it all."""
    keys = MOMENTS if moments else ()
    for name, parameter in trainable(engine.module).items():
        if engine.zero_optimization_stage() == 0:
            memory = engine.optimizer.state[parameter] if moments else {}
            yield name, {"value": parameter.detach()} | {key: memory[key] for key in keys}
        else:
            value = {"value": safe_get_full_fp32_param(parameter)}
            yield name, value | {key: safe_get_full_optimizer_state(parameter, key) for key in keys}


def restore_moments(engine: Any, moment: Callable[[str, str], Tensor], step: int) -> None:
    """Put back the moments that `whole_state` gave after `step` steps; the values went into the module before.

    AdamW makes its moments in its first step, so their places are made here. Each rank keeps its part.

    Args:
        moment: the whole tensor for one of `MOMENTS` and a parameter's name.
    """
    stage, outer = engine.zero_optimization_stage(), engine.optimizer
    adam = outer if stage == 0 else outer.optimizer
    places = outer.fp32_partitioned_groups_flat if stage == 3 else [p for g in adam.param_groups for p in g["params"]]
    for place in places:
        memory = {key: torch.zeros_like(place) for key in MOMENTS}
        adam.state[place] = {"step": torch.tensor(float(step)), **memory}
    if stage in (1, 2):
        for group, partition in zip(outer.bit16_groups, outer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, partition, adam.state)
    for name, parameter in trainable(engine.module).items():
        for key in MOMENTS:
            value = moment(key, name).to(engine.device)
            if stage == 0:
                adam.state[parameter][key].copy_(value)
            elif stage == 3:
                share = parameter.partition_numel()  # type: ignore[attr-defined]
                padded = torch.nn.functional.pad(value.flatten(), (0, share * engine.world_size - value.numel()))
                safe_set_local_optimizer_state(parameter, padded[share * engine.global_rank :][:share], key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
