"""Whole state in, whole state out, whatever is partitioned; settings that exclude each other; precision by network."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aptp_platform.config import ConfigError, EngineConfig, TrainingConfig
from aptp_platform.storage.errors import DamagedError
from aptp_platform.train.checkpoint import Restored
from aptp_platform.train.engine import check_engine, compute_in, learning_rate_at
from aptp_platform.train.specs import result_of
from tests.support.toy_ranks import CONFIG, run_ranks
from tests.support.toy_spec import ToyModule


def test_two_ranks_are_one_and_a_checkpoint_is_exact(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, (0,), tmp_path / "alone")
    assert alone["resumed"] == alone["undisturbed"]
    assert len(set(alone["undisturbed"])) == 4
    for both in run_ranks(2, (0, 1, 2, 3), tmp_path / "both"):
        assert both["resumed"] == both["undisturbed"]
        torch.testing.assert_close(both["undisturbed"], alone["undisturbed"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both["values"], alone["values"], rtol=1e-4, atol=1e-5)
    assert not alone["compiled"], "DeepSpeed compiled an operator: a node that trains would need a compiler"
    assert alone["table"] is None, "what DeepSpeed knows of its operators is not as it was"
    _check_files(tmp_path / "both" / "stage-3")


def _check_files(folder: Path) -> None:
    """Two ranks wrote it, this one process reads it; the frozen part is not in it."""
    with Restored(folder, CONFIG) as restored:
        module = ToyModule()
        restored.fill(module)
        assert restored.step == 2
        assert not torch.equal(module.codes, ToyModule().codes)
    names = json.loads((folder / "checkpoint.json").read_text())["names"]
    assert sorted(names) == [
        *("buffer/seen",),
        *(
            f"{kind}/{name}"
            for kind in ("exp_avg", "exp_avg_sq", "value")
            for name in ("codes", "linear.bias", "linear.weight")
        ),
    ]
    with pytest.raises(ConfigError, match=r"another config \(prune.batch_size: 4, now 8\)"):
        Restored(folder, {"seed": 0, "prune": {"batch_size": 8}})
    part = folder / "rank-01-of-02.safetensors"
    os.truncate(part, part.stat().st_size - 1)
    with pytest.raises(DamagedError, match=rf"^{folder}: this checkpoint is damaged \({part.name} does not read: .*"):
        Restored(folder, CONFIG)
    part.unlink()
    with pytest.raises(DamagedError, match=r"damaged \(a part is missing: \d+ tensors, \S+ first\): bring it back"):
        Restored(folder, CONFIG)
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(DamagedError, match=r"damaged \(checkpoint.json does not read: "):
        Restored(folder, CONFIG)


@pytest.mark.parametrize(
    ("engine", "gpus", "line"),
    [
        ({"offload": True, "zero_stage": 0}, 1, "prune.run.engine.offload: true: needs a partitioned optimizer"),
        ({"offload": True, "zero_stage": 2}, 0, "prune.run.engine.offload: true: moves the optimizer from the GPU"),
        ({"gradient_accumulation": 0}, 0, "prune.run.engine.gradient_accumulation: 0"),
        ({"gradient_clipping": -1.0}, 0, "prune.run.engine.gradient_clipping: -1.0"),
    ],
)
def test_settings_that_exclude_each_other_are_translate_errors(engine: dict[str, Any], gpus: float, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_engine(TrainingConfig(gpus_per_worker=gpus, engine=EngineConfig(**engine)), "prune.run")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    check_engine(TrainingConfig(gpus_per_worker=1, engine=EngineConfig(zero_stage=2, offload=True)), "prune.run")


def test_only_the_named_network_computes_in_half_precision() -> None:
    network, seen = nn.Linear(4, 4), []

    def fail(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        if len(seen) == 2:
            raise RuntimeError("in the middle of a forward pass")

    compute_in(network, "bf16")
    network.register_forward_pre_hook(fail)
    assert network(torch.ones(1, 4)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        network(torch.ones(1, 4))
    assert seen == [True, True]
    assert not torch.is_autocast_enabled("cpu")
    assert network.weight.dtype == torch.float32


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    constant = TrainingConfig(steps=101, warmup_steps=10, learning_rate=2.0)
    assert [learning_rate_at(constant, step) for step in (0, 4, 9, 10, 100)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    falling = replace(constant, final_learning_rate=0.5)
    rates = [learning_rate_at(falling, step) for step in range(101)]
    assert rates[:10] == [learning_rate_at(constant, step) for step in range(10)]
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.25)  # halfway
    assert rates[100] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_number_of_steps_belongs_to_a_result_only_where_the_learning_rate_falls() -> None:
    constant, falling = (TrainingConfig(steps=10, final_learning_rate=final) for final in (None, 0.0))
    assert result_of(constant) == result_of(replace(constant, steps=20))
    assert result_of(falling) != result_of(replace(falling, steps=20))
