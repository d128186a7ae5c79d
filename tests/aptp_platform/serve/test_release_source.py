"""A release in a bucket: a process fetches what it needs, once, and takes nothing that is not what was published."""

from pathlib import Path

import pytest
import s3fs

from aptp.expert import load_expert
from aptp.release import BrokenReleaseError
from aptp.router import Router
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.storage.store import StorageConfig, Store
from tests.support.s3_server import S3Server
from tests.support.tiny_release import ANCHORS, build_release


def test_a_release_in_a_bucket_is_fetched_in_part_and_verified(s3_server: S3Server, tmp_path: Path) -> None:
    release = build_release(tmp_path / "release", num_codes=2, with_teacher=True)
    bucket = s3_server.bucket("served")
    storage = StorageConfig(endpoint=s3_server.endpoint)
    Store.open(bucket, storage).publish(release.path, "release-1")
    source = ReleaseSource(f"{bucket}/release-1", storage, str(tmp_path / "cache"))
    local = ReleaseSource(str(release.path))
    assert source.catalog(with_teacher=True) == local.catalog(with_teacher=True)

    router = source.for_router()
    wanted = Router.load(release.router_path).route(ANCHORS)
    assert Router.load(router.router_path).route(ANCHORS).indices.tolist() == wanted.indices.tolist()
    assert not (router.path / "experts").exists(), "a router needs no expert"
    expert = source.for_model("code-01")
    load_expert(expert.expert_path(1))
    assert not expert.expert_path(0).exists(), "nor one expert another"
    assert expert.teacher_path is None

    files = s3fs.S3FileSystem(endpoint_url=s3_server.endpoint, use_listings_cache=False)
    files.rm("served/release-1/experts/01", recursive=True)
    assert source.for_model("code-01").path == expert.path, "what is in the cache is not fetched again"

    weights = "served/release-1/experts/00/expert.safetensors"
    damaged = bytearray(files.cat_file(weights))
    damaged[-1] ^= 1
    files.pipe_file(weights, bytes(damaged))
    with pytest.raises(BrokenReleaseError, match=rf"{bucket}/release-1/experts/00/expert\.safetensors is missing or"):
        source.for_model("code-00")
    damaged[-1] ^= 1
    files.pipe_file(weights, bytes(damaged))
    source.for_model("code-00")

    kept = router.path / "router/router.json"
    kept.write_text("damaged")
    assert source.for_router().path == router.path, "what a node kept and was damaged there is fetched again"
    assert kept.read_bytes() == (release.router_path / "router.json").read_bytes()

    with pytest.raises(BrokenReleaseError, match=rf"{bucket}/release-1/experts/01/.* is missing"):
        source.catalog(with_teacher=False)
