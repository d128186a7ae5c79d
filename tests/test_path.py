"""The whole path, small: captioned images in a bucket, router and codes, experts, a release, a PNG over HTTP."""

import base64
import io
import json
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from aptp.expert import load_expert, read_expert_info
from aptp.release import read_release
from aptp.router import Router
from aptp_platform.config import ConfigError, ReuseConfig, RunConfig, TrainingConfig
from aptp_platform.config_file import load_config, parse_config, to_tree
from aptp_platform.experts.evaluate import evaluate
from aptp_platform.experts.evidence.scores import load_scores
from aptp_platform.experts.evidence.trials import ArmRun
from aptp_platform.experts.experiment.comparison import compare
from aptp_platform.models import load_pipeline_parts
from aptp_platform.run.cluster import free_ports
from aptp_platform.run.path import require_stage, run_stage
from aptp_platform.run.stages import STAGES
from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs
from aptp_platform.storage.store import StorageConfig, Store
from aptp_platform.train.heldout_test import HeldOutTest
from tests.support.captioned import IMAGE_SIZE, write_shards
from tests.support.s3_server import S3Server
from tests.support.tiny_pipeline import build_pipeline

TRAINING = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "checkpoint_every": 6, "learning_rate": 0.02}

OFF = TrainingConfig(steps=0)


@pytest.fixture(scope="module")
def config(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("path")
    build_pipeline().save_pretrained(folder / "model")
    bucket = s3_server.bucket("captioned")
    write_shards(folder / "shards", train=48, heldout=16)
    Store.open(bucket, StorageConfig(endpoint=s3_server.endpoint)).publish(folder / "shards", "images")
    return parse_config(
        {
            "root": str(folder / "run"),
            "storage": {"endpoint": s3_server.endpoint},
            "data": {"source": f"{bucket}/images", "image_size": IMAGE_SIZE},
            "model": {"pipeline": str(folder / "model")},
            "router": {"num_codes": 2, "budget": 0.7, "need": {"enough": 16}},
            "encode": {"batch_size": 16},
            "prune": {"run": TRAINING, "objective": {"warmup_steps": 1, "balance": 10.0}},  # so few steps part no codes
            "samples": {"prompts": ["a cat", "a red car"], "inference_steps": 2},
            "share": {"run": TRAINING},
            "assign": {"if_fewer": "merge"},
            "cut": {"baselines": []},
            "finetune": {"run": TRAINING | {"heldout_rows": 12}},
            "evaluate": {"images": 16, "generated": 4, "inference_steps": 2, "timesteps": [500], "batch_size": 8},
        }
    )


@pytest.mark.usefixtures("local_ray")
def test_from_captioned_images_in_a_bucket_to_a_served_png(config: RunConfig) -> None:
    from ray import serve

    said: list[str] = []
    for stage in STAGES:
        run_stage(stage, config, said.append)
    assert not any("reused" in line for line in said)

    release = read_release(Path(config.root) / "release")
    assert release.num_codes == 2
    assert release.ratio < config.router.budget + 0.02  # less where a random network gains nothing by size
    check_events(Path(config.root))
    metrics = json.loads((release.path / "report" / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"teacher", "routed", "random_routing", "oracle"}
    assert metrics["arms"]["teacher"]["cost_ratio"] == 1
    assert metrics["arms"]["random_routing"]["cost_ratio"] == pytest.approx(metrics["arms"]["routed"]["cost_ratio"])
    page = (release.path / "report" / "report.html").read_text()
    assert page.count("<h2>") == 5
    check_scores(Path(config.root) / "evaluated", metrics)
    assert not list(release.path.rglob("scores.*")), "what only a comparison reads is not released"

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    small = {"num_cpus": 0.1, "num_threads": 1}
    args = ServeArgs.model_validate(
        {"release": str(release.path), "experts": small, "router": small, "ingress": {"num_cpus": 0.1}}
    )
    try:
        serve.run(build(args), name="aptp", route_prefix="/")
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/images/generations",
            json={"prompt": "a cat", "seed": 3, "num_inference_steps": 2},
            timeout=60,
        )
    finally:
        serve.shutdown()
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert image.format == "PNG"
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def check_scores(folder: Path, metrics: dict[str, Any]) -> None:
    """A comparison needs nothing but what was saved, and finds what the evaluation found."""
    scores = load_scores(folder)
    assert scores.texts is None
    assert all(len(features) == len(scores.pictures[arm]) == 4 for arm, features in scores.features.items())
    assert scores.teacher.distances.max() == 0 < min(net.distances.min() for net in scores.experts)
    assert min(net.milliseconds for net in scores.networks.values()) > 0
    found = compare([ArmRun("routed", scores)], tolerance=1.0)["budgets"]["0.7"]
    for name, facts in metrics["arms"].items():
        assert found["arms"][name]["cmmd_lite0"] == facts.get("cmmd_lite0")
        assert found["arms"][name]["extra_loss"] == pytest.approx(facts.get("extra_loss", 0))


def check_events(root: Path) -> None:
    """TensorBoard's files hold what a person looks for, and the config as it was resolved lies beside them."""
    for folder, pictures in (("pruned", {"samples", "usage_by_step"}), ("finetuned/00", {"samples"})):
        log = root / folder.split("/")[0] / "tensorboard" / folder.partition("/")[2]
        (file,) = log.glob("from-00000000/events*")
        seen = {value.tag: value for event in read_events(file) for value in event.summary.value}
        assert {tag for tag, value in seen.items() if value.HasField("image")} == pictures
        assert {"total", "images/s", "denoising"} <= seen.keys()
        grid = Image.open(io.BytesIO(seen["samples"].image.encoded_image_string))
        assert grid.size == (2 * IMAGE_SIZE, 2 * IMAGE_SIZE), "two prompts; the full model above, the pruned one below"
        assert load_config(log / "config.yaml").root == str(root)


def read_events(file: Path) -> list[Event]:
    """The records of an event file: length, checksum, bytes, checksum."""
    data, place, events = file.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += length + 16
    return events


@pytest.mark.usefixtures("local_ray")
def test_a_second_run_reuses_every_stage_and_another_config_does_not(config: RunConfig) -> None:
    said: list[str] = []
    for stage in STAGES:
        run_stage(stage, config, said.append)
    assert all("reused" in line for line in said)
    assert len(said) == len(STAGES)

    other = parse_config({**to_tree(config), "router": {"num_codes": 2, "budget": 0.8}})
    assert require_stage("encode", other) == require_stage("encode", config)
    with pytest.raises(ConfigError, match=r"share: its result .* was made from another config"):
        run_stage("assign", other, said.append)


@pytest.mark.usefixtures("local_ray")
def test_every_expert_was_trained_and_measured_on_the_prompts_that_it_serves(config: RunConfig) -> None:
    for stage in STAGES:
        run_stage(stage, config)
    root = Path(config.root)
    test = HeldOutTest(config, load_pipeline_parts(config.model, config.storage), 12)
    routes = Router.load(root / "assigned" / "router").route_embeddings(test.embeddings).indices.tolist()
    curves = {path.stem: json.loads(path.read_text())[-1] for path in (root / "finetuned" / "curves").iterdir()}
    assert sorted(curves) == sorted({f"{code:02d}" for code in routes})
    for name, point in curves.items():
        info = read_expert_info(root / "cut" / name)
        assert info == read_expert_info(root / "finetuned" / name)
        before, after = load_expert(root / "cut" / name), load_expert(root / "finetuned" / name)
        moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
        assert all(moved), f"{sum(moved)} of {len(moved)} parameters of {name} were trained"
        rows = [row for row in range(12) if f"{routes[row]:02d}" == name]
        assert point == pytest.approx(asdict(test.of_network(after, rows, info.cost.ratio)) | {"step": 6}, rel=1e-4)


@pytest.mark.usefixtures("local_ray")
def test_a_run_starts_from_the_stages_of_another(config: RunConfig, tmp_path: Path) -> None:
    for stage in ("encode", "prune", "share"):
        run_stage(stage, config)
    reuse = ReuseConfig(encode=config.root, prune=config.root)
    other = replace(config, root=str(tmp_path / "other"), reuse=reuse, share=replace(config.share, run=OFF))
    said: list[str] = []
    for stage in ("encode", "prune", "share"):
        run_stage(stage, other, said.append)
    assert said[0] == f"[encode] reused: {config.root}/encoded, as reuse.encode says"
    assert sorted(path.name for path in Path(other.root).iterdir()) == ["leases", "shared", "stages"]
    name = "shared/router/router.safetensors"
    assert Path(other.root, name).read_bytes() == Path(config.root, "pruned/router/router.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"prune: its result in .* was made from another config"):
        run_stage("prune", replace(other, seed=1))


@pytest.mark.usefixtures("local_ray")
def test_an_evaluation_that_no_cluster_can_hold_is_one_line(config: RunConfig) -> None:
    wanted = replace(config, evaluate=replace(config.evaluate, gpus_per_network=1.0))
    with pytest.raises(ConfigError, match=r"^evaluate.gpus_per_network: 1: the cluster has at most 0 GPU: lower it"):
        evaluate(wanted)


def test_a_stage_before_its_inputs_says_which_job_to_run(config: RunConfig, tmp_path: Path) -> None:
    elsewhere = parse_config({**to_tree(config), "root": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"encode: .* holds no finished result of it; run the encode job first"):
        run_stage("prune", elsewhere)
