"""Both training stages on real worker groups, and what is refused before one starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aptp.router import Router
from aptp_platform.config import ConfigError, RunConfig, StorageConfig
from aptp_platform.storage.store import Store
from aptp_platform.train.stream import Stream, files_of
from aptp_platform.train.trainer import check_group, check_shape, expert_steps, prune, share
from tests.support.fault_proxy import FAULTS, FaultProxy
from tests.support.s3_server import S3Server
from tests.support.tiny_run import ROWS, tiny_run


@pytest.fixture(scope="module")
def pruned(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A run of two workers, pruned undisturbed but measured on the way, and its summary."""
    config = tiny_run(tmp_path_factory.mktemp("pruned"), workers=2)
    config = replace(
        config,
        prune=replace(config.prune, run=replace(config.prune.run, heldout_rows=12)),
    )
    return config, prune(config)


def test_a_bucket_that_fails_now_and_then_changes_nothing(
    pruned: tuple[RunConfig, dict[str, Any]], fault_proxy: FaultProxy
) -> None:
    config, summary = pruned
    bucket = S3Server(fault_proxy.endpoint).bucket("disturbed")
    remote = replace(
        config,
        root=f"{bucket}/run",
        storage=StorageConfig(endpoint=fault_proxy.endpoint, timeout_s=1.0),
        prune=replace(config.prune, run=replace(config.prune.run, heldout_rows=0)),  # it changes nothing either
    )
    root = Store.open(remote.root, remote.storage)
    root.publish(Path(config.root) / "encoded", "encoded")
    fault_proxy.every = 5
    assert prune(remote) == summary
    assert all(fault_proxy.hits[fault] > 1 for fault in FAULTS), fault_proxy.hits
    fault_proxy.every = 0
    for name in ("router.safetensors", "router.json"):
        with root.join("pruned", "router").open_file(name) as stream:
            assert stream.read() == Path(config.root, "pruned", "router", name).read_bytes()


def test_pruning_learns_and_publishes(pruned: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = pruned
    root = Path(config.root)

    router = Router.load(root / "pruned" / "router")
    assert summary["MACs ratio"] == pytest.approx(config.router.budget, rel=0.011)
    assert router.num_codes == 2
    assert all(share > 0 for share in summary["usage"])

    curve = json.loads((root / "pruned" / "curves" / "prune.json").read_text())
    assert [(point["step"], point["rows"]) for point in curve] == [(2, 12), (4, 12)]
    assert share(config) == {"steps": 0}
    assert (root / "shared" / "router").is_dir()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("router", "training", "line"),
    [
        ({"num_codes": 97}, {}, "router.num_codes: 97: there are only 96 prompts"),
        ({"budget": 0.05}, {}, r"router.budget: 0.05: this UNet cannot be pruned below 0\.\d+ of its MACs"),
        (
            {},
            {"workers": 99, "batch_size": 99},
            "prune.run.workers: 99: with prune.run.cpus_per_worker 0.5 they need 49.5 CPU and 0.05 for the tasks",
        ),
        (
            {},
            {"gpus_per_worker": 1.0},
            "prune.run.workers: 1: with prune.run.gpus_per_worker 1 they need 1 GPU, the cluster has",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_it_starts(
    router: dict[str, Any], training: dict[str, Any], line: str, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path)
    config = replace(
        config,
        router=replace(config.router, **router),
        prune=replace(config.prune, run=replace(config.prune.run, **training)),
    )
    encoded = Store.open(config.root).join("encoded", "train")
    with pytest.raises(ConfigError, match=f"^{line}[^\n]*$"):
        prune(config)
    assert not Path(config.root, "pruned").exists()
    fine = tiny_run(tmp_path / "fine", num_codes=2 * 2 * ROWS)
    check_group(fine.prune.run, "prune.run", fine.encode)
    check_shape(fine, Stream(encoded, files_of(encoded), 0))


def test_steps_are_shared_out_by_prompts(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    run = replace(config.finetune.run, steps=100)
    config = replace(config, router=replace(config.router, num_codes=4), finetune=replace(config.finetune, run=run))
    assert expert_steps(config, [10, 30]) == [100, 100]
    mean = replace(config, finetune=replace(config.finetune, steps_of="mean"))
    assert expert_steps(mean, [10, 30]) == [100, 300], "two of four codes were merged: all 400 steps are trained"
    assert expert_steps(mean, [1, 9999]) == [1, 400]
