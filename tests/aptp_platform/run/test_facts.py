"""What a stage's result depends on: no more, so that a run can go on elsewhere, and no less, so that it is its own."""

import json
from pathlib import Path

import pytest

from aptp_platform.config import RunConfig
from aptp_platform.config_file import with_fields
from aptp_platform.data.captions import FORMATS, read_file
from aptp_platform.data.sample import CaptionedImage
from aptp_platform.run.facts import Facts, changes, only_longer
from aptp_platform.run.sources import LISTINGS, data_files
from aptp_platform.run.stages import STAGES
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import Store
from tests.support.captioned import image_bytes, write_shards
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server
from tests.support.tiny_run import tiny_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write_shards(tmp_path / "data", train=6, heldout=2)
    return with_fields(tiny_run(tmp_path), {"data.source": str(tmp_path / "data"), "share.run.steps": 4})


def prints(config: RunConfig) -> dict[str, str]:
    known = Facts(config)
    return {stage: known.fingerprint(stage) for stage in STAGES}


def test_how_it_is_computed_is_not_in_it(config: RunConfig) -> None:
    free = {
        "encode.batch_size": 3, "encode.actors": 2, "encode.readers": 9, "encode.cpus_per_actor": 2.0,
        "data.max_bad_share": 0.5, "refit.batch_size": 3, "evaluate.cpus_per_network": 2.0, "storage.attempts": 3,
        "samples.prompts": ["a cat"], "root": "/elsewhere",
    }  # fmt: skip
    for training in ("prune", "share", "finetune"):
        run = {
            "workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 1.0, "max_failures": 9, "checkpoint_every": 7,
            "checkpoints_kept": 5, "heldout_rows": 8, "prefetch_bytes": 64_000_000, "engine.zero_stage": 3,
            "engine.offload": True, "engine.activation_checkpointing": True,
        }  # fmt: skip
        free |= {f"{training}.run.{field}": value for field, value in run.items()}
    assert prints(with_fields(config, free)) == prints(config)


@pytest.mark.parametrize(
    ("field", "value", "stage"),
    [
        ("data.image_size", 32, "encode"),
        ("encode.cache_latents", False, "encode"),
        ("seed", 5, "prune"),
        ("model.num_text_tokens", 8, "prune"),
        ("prune.run.steps", 9, "prune"),
        ("prune.run.engine.precision", "bf16", "prune"),
        ("share.run.learning_rate", 0.5, "share"),
        ("finetune.steps_of", "mean", "finetune"),
        ("evaluate.images", 3, "evaluate"),
    ],
)
def test_a_field_that_changes_a_result_changes_it_from_its_stage_on(
    config: RunConfig, field: str, value: object, stage: str
) -> None:
    before, after = prints(config), prints(with_fields(config, {field: value}))
    changed = [name for name in STAGES if before[name] != after[name]]
    assert changed[0] == stage
    assert changed[-1] == "publish"
    found = changes(Facts(config).of(stage), Facts(with_fields(config, {field: value})).of(stage))
    assert len(found) == 1
    assert found[0].startswith(f"{field}: ")


LISTED = {  # by its ending: a listing, what is in it, and the image that it names
    ".jsonl": ("train/metadata.jsonl", json.dumps({"file_name": "a.png", "text": "a"}), "train/a.png"),
    ".json": (
        "annotations/captions_train2017.json",
        json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}),
        "train2017/a.png",
    ),
    ".tsv": ("listed.tsv", "file\tcaption\na.png\ta\n", "a.png"),
}


@pytest.mark.parametrize("ending", LISTED)
def test_an_image_that_a_listing_names_is_in_it(config: RunConfig, tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "listed"
    listing, text, image = LISTED[ending]
    for name, data in ((listing, text.encode()), (image, image_bytes(0))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_shards(folder, train=0, heldout=2)
    (row,) = read_file(Store.open(folder), listing)
    assert isinstance(row, CaptionedImage), "it is read where it is looked for"
    config = with_fields(config, {"data.source": str(folder), "data.train": listing})
    before = Facts(config)
    first = before.fingerprint("encode")
    (folder / image).write_bytes(image_bytes(1))
    assert Facts(config).fingerprint("encode") != first
    (told,) = changes(before.of("encode"), Facts(config).of("encode"))
    assert told.startswith("data.source (listed images): ")
    unasked = with_fields(config, {"data.train": listing.replace(ending, "*")})
    assert data_files(unasked.data, unasked.storage) == data_files(config.data, config.storage)


def test_the_formats_that_list_images_are_known() -> None:
    listing = {ending for ending, read in FORMATS.items() if read.__module__.endswith(".listing")}
    assert listing == set(LISTINGS) == set(LISTED)


def test_models_count_by_their_files_where_they_are_used(config: RunConfig) -> None:
    before = prints(config)
    for part, stage in (("unet", "prune"), ("vae", "encode")):
        file = Path(config.model.pipeline, part, "config.json")
        file.write_text(file.read_text() + " ")
        after = prints(config)
        assert next(name for name in STAGES if before[name] != after[name]) == stage
        before = after


def test_a_source_is_listed_once_and_one_that_cannot_be_is_no_empty_one(
    config: RunConfig, fault_proxy: FaultProxy
) -> None:
    storage = {"storage.endpoint": fault_proxy.endpoint, "storage.attempts": 1}
    bucket = S3Server(fault_proxy.endpoint).bucket("once")
    Store.open(bucket, with_fields(config, storage).storage).publish(config.data.source, "data")
    config = with_fields(config, {**storage, "data.source": f"{bucket}/data"})
    listed: list[str] = []

    def note(method: str, path: str) -> None:
        listed.extend([path] if "list-type" in path else [])

    fault_proxy.refuse = note
    prints(config)
    assert len(listed) == 1, listed
    fault_proxy.refuse = lambda method, path: 503
    with pytest.raises(StoreError, match="not reachable"):
        Facts(config).of("encode")


def test_more_steps_go_on_unless_the_learning_rate_follows_from_them(config: RunConfig) -> None:
    known = Facts(config).of("prune")
    longer, other = {"prune.run.steps": config.prune.run.steps + 4}, {"seed": 9}
    falling = with_fields(config, {"prune.run.final_learning_rate": 0.0})
    assert only_longer(known, Facts(with_fields(config, longer)).of("prune"))
    assert not only_longer(known, Facts(with_fields(config, longer | other)).of("prune"))
    assert not only_longer(known, Facts(with_fields(config, {"prune.run.steps": 1})).of("prune"))
    assert not only_longer(Facts(falling).of("prune"), Facts(with_fields(falling, longer)).of("prune"))
    assert not only_longer(known, known)
