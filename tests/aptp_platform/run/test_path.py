"""Nothing that a stage has made is removed by running it; what there is is reused, gone on with, or refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import dump_config, with_fields
from aptp_platform.run.facts import Facts
from aptp_platform.run.path import run_stage
from aptp_platform.run.record import finish_leaving, held_by, read_record, set_aside, write_record
from aptp_platform.run.stages import STAGES, readers_of
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import StorageConfig, Store
from tests.support.captioned import write_shards
from tests.support.s3_server import S3Server
from tests.support.tiny_run import tiny_run

REMOVE = Path(__file__).parents[3] / "jobs/remove_stage.py"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose first stages are finished, as their records say."""
    write_shards(tmp_path / "data", train=6, heldout=2)
    config = with_fields(tiny_run(tmp_path), {"data.source": str(tmp_path / "data")})
    router = Path(config.root, "pruned", "router")
    router.mkdir(parents=True)
    (router / "router.json").write_text("learned")
    record(config, "encode", "prune")
    return config


def record(config: RunConfig, *stages: str) -> None:
    known = Facts(config)
    for stage in stages:
        done = {"fingerprint": known.fingerprint(stage), "facts": known.of(stage), "summary": {"of": stage}}
        write_record(Store.open(config.root), stage, done)


def test_a_finished_stage_is_reused_and_one_of_another_config_is_refused_and_kept(config: RunConfig) -> None:
    root, said = Path(config.root), list[str]()
    elsewhere = with_fields(config, {"prune.run.workers": 2, "prune.run.engine.zero_stage": 3, "encode.actors": 9})
    for same in (config, elsewhere):
        assert run_stage("encode", same, said.append) == {"of": "encode"}
        assert run_stage("prune", same, said.append) == {"of": "prune"}
    assert all("reused" in line for line in said)
    before = sorted(root.rglob("*"))
    for fields, told in (
        ({"router.budget": 0.9}, r"\(router.budget: 0.7, now 0.9\)"),
        ({"seed": 1, "router.budget": 0.9, "space.depth": "every", "router.initial_depth": 1.0}, "; and 1 more"),
        ({"prune.run.steps": 1}, r"\(prune.run.steps: 4, now 1\)"),
    ):
        other = with_fields(config, fields)
        with pytest.raises(ConfigError, match=rf"^prune: what {root}/pruned holds was made from .*{told}.*--restart p"):
            run_stage("prune", other)
        with pytest.raises(ConfigError, match=rf"^prune: its result in {root} was made from .*{told}"):
            run_stage("share", other)
    (Path(config.data.source) / "train-09.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"\(data.train: 3 files of \d+ bytes, now 4 files of \d+ bytes\)"):
        run_stage("encode", config)
    shutil.rmtree(config.data.source)
    with pytest.raises(StoreError, match=r"does not exist; .* change data.source"):
        run_stage("encode", config, restart="yes")
    assert sorted(root.rglob("*")) == before


def test_a_restart_puts_aside_what_there_is_and_counts(config: RunConfig) -> None:
    root, said = Store.open(config.root), list[str]()
    assert run_stage("share", config, said.append) == {"steps": 0}
    record(config, "encode")
    pruned_again = with_fields(config, {"router.budget": 0.8})
    record(pruned_again, "prune")
    with pytest.raises(ConfigError, match=r"^share: what .* \(prune was made anew\): .*--restart share, which keeps"):
        run_stage("share", pruned_again)
    run_stage("share", pruned_again, said.append, restart="changed")
    run_stage("share", pruned_again, said.append, restart="changed")
    run_stage("share", pruned_again, said.append, restart="yes")
    assert [line.split()[1] for line in said] == ["done", "what", "done", "reused:", "what", "done"]
    for number in (1, 2):
        assert root.list(f"aside/share-{number}/shared/router/*") == [f"aside/share-{number}/shared/router/router.json"]
    assert root.list("shared/router/*") == ["shared/router/router.json"]

    write_record(root, "share", {"fingerprint": "of an older version", "summary": {}})
    with pytest.raises(ConfigError, match=r"^share: what .* \(its record is of an older version"):
        run_stage("share", pruned_again)


def test_the_stages_that_read_another() -> None:
    assert readers_of(["prune"]) == set(STAGES) - {"encode", "prune"}
    assert readers_of(["refit"]) == {"evaluate", "publish"}
    assert readers_of([]) == set()


def test_putting_aside_in_a_bucket_can_be_interrupted(s3_server: S3Server) -> None:
    root = Store.open(s3_server.bucket("aside"), StorageConfig(endpoint=s3_server.endpoint))
    files = [f"pruned/{name}" for name in ("a", "b/c")]
    for name in files:
        root.write_json(name, name)
    write_record(root, "prune", {"fingerprint": "x", "summary": {}})
    place = set_aside(root, "prune")
    assert read_record(root, "prune") is None
    root.write_json("pruned/b/c", "pruned/b/c")  # as if a move had broken off: the copies are whole, one is left
    write_record(root, "prune", {"leaving": place})
    assert finish_leaving(root, "prune", read_record(root, "prune"))
    assert [root.read_json(f"{place}/{name}") for name in files] == files
    assert root.list() == [f"{place}/pruned/a", f"{place}/pruned/b/c", f"{place}/stage.json"]
    (held,) = held_by(root, "prune")
    assert (held.name, held.files, held.finished) == ("aside/prune-1", 3, True)


def test_removing_is_a_command_that_says_what_it_removes_and_must_be_told_so(config: RunConfig, tmp_path: Path) -> None:
    def remove(*more: str) -> str:
        command = [sys.executable, str(REMOVE), "--config", str(tmp_path / "config.yaml"), "--stage", "prune", *more]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    (tmp_path / "config.yaml").write_text(dump_config(config))
    pruned = Path(config.root, "pruned")
    assert f"{pruned}: 1 files, 7 bytes, finished\nnothing is removed; --yes" in remove()
    assert pruned.exists()
    assert remove("--yes").endswith("removed\n")
    assert not pruned.exists()
    assert "holds nothing of prune" in remove("--yes")
    assert Path(config.root, "encoded").exists()
