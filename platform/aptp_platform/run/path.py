"""The path from captioned images to a release: its stages, in order, each run once for what it depends on.

A stage's fingerprint covers the config sections it reads, the stages before it and the files it starts from. A finished
stage with that fingerprint is reused. One with another fingerprint is removed and run again. One that was interrupted
continues from what its folder holds.
"""

import hashlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import places, to_tree
from aptp_platform.run import layout
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store

Summary = dict[str, Any]
MODEL_FILES = ("**/*.json", "**/*.safetensors", "**/*.txt")  # not the card or its pictures


@dataclass(frozen=True)
class Stage:
    """One step of the path."""

    name: str
    script: str  # the file in jobs/ that is submitted for it
    folder: str  # under the run's root; written by this stage alone
    sections: tuple[str, ...]  # of the config: what the result depends on
    after: tuple[str, ...]  # stages whose folders it reads
    entry: str  # "module:function" taking a RunConfig and returning a summary; imported when the stage runs
    sources: tuple[str, ...] = ()  # "data", "model": files outside the run that it starts from


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "encode",
            "encode_latents",
            layout.ENCODED,
            ("data", "model", "encode"),
            (),
            "data.encode:encode",
            ("data", "model"),
        ),
        Stage(
            "prune",
            "prune_unet",
            layout.PRUNED,
            ("seed", "router", "space", "prune"),
            ("encode",),
            "train.trainer:prune",
        ),
        Stage("share", "share_training", layout.SHARED, ("share",), ("encode", "prune"), "train.trainer:share"),
        Stage("assign", "assign_prompts", layout.ASSIGNED, ("assign",), ("encode", "share"), "experts.assign:assign"),
        Stage("cut", "cut_experts", layout.CUT, ("cut",), ("assign",), "experts.cut:cut"),
        Stage(
            "finetune", "finetune_experts", layout.FINETUNED, ("finetune",), ("encode", "cut"), "train.trainer:finetune"
        ),
        Stage(
            "refit",
            "refit_router",
            layout.REFITTED,
            ("refit",),
            ("encode", "assign", "finetune"),
            "experts.refit:refit",
        ),
        Stage(
            "evaluate",
            "evaluate_experts",
            layout.EVALUATED,
            ("evaluate",),
            ("encode", "refit"),
            "experts.evaluate:evaluate",
        ),
        Stage("publish", "publish_release", layout.RELEASE, (), ("refit", "evaluate"), "experts.publish:publish"),
    )
}


def run_stage(name: str, config: RunConfig, say: Callable[[str], None] = print) -> Summary:
    """Run one stage, or reuse its finished result; returns its summary.

    Raises:
        ConfigError: a stage before it has not been run, or was run for another config.
        LeaseError: another process works on this run.
    """
    stage, root = STAGES[name], Store.open(config.root, config.storage)
    if getattr(config.reuse, name, None):
        summary = require_stage(name, config)
        say(f"[{name}] reused: {layout.home(config, name).join(stage.folder).uri}, as reuse.{name} says")
        return summary
    for earlier in stage.after:
        require_stage(earlier, config)
    expected = fingerprint(name, config)
    with Lease(root, "run") as lease:
        record = _read(root, name)
        if record is not None and record["fingerprint"] != expected:
            root.remove(stage.folder)
            record = None
        if record is not None and "summary" in record:
            say(f"[{name}] reused: {root.join(stage.folder).uri} was made from the same config and inputs")
            return record["summary"]
        root.write_json(_record(name), {"fingerprint": expected})
        started = time.monotonic()
        module, function = stage.entry.split(":")
        summary = getattr(importlib.import_module(f"aptp_platform.{module}"), function)(config)
        lease.require()
        seconds = round(time.monotonic() - started, 1)
        root.write_json(_record(name), {"fingerprint": expected, "seconds": seconds, "summary": summary})
    say(f"[{name}] done in {seconds:.0f} s: {_brief(summary)}")
    return summary


def require_stage(name: str, config: RunConfig) -> Summary:
    """The summary of a finished stage, if it was made from this config."""
    root = layout.home(config, name)
    record = _read(root, name)
    if record is None or "summary" not in record:
        raise ConfigError(f"{name}: {root.uri} holds no finished result of it; run the {name} job first")
    if record["fingerprint"] != fingerprint(name, config):
        raise ConfigError(
            f"{name}: its result in {root.uri} was made from another config or other inputs; run the {name} job "
            "again, or give this run a root of its own"
        )
    return record["summary"]


def reach_places(config: RunConfig) -> None:
    """Check that every bucket the run needs answers, before the run waits or pays for anything else.

    Raises:
        ConfigError: one does not answer, or refuses; the field that names it is in the line.
    """
    for field, place in places(config).items():
        try:
            Store.open(place, config.storage).reach()
        except StoreError as error:
            raise ConfigError(f"{field}: {error}") from None


def forget(config: RunConfig) -> None:
    """Remove what every stage of this run has made, and the record of it."""
    root = Store.open(config.root, config.storage)
    for stage in STAGES.values():
        root.remove(_record(stage.name))
        root.remove(stage.folder)


def fingerprint(name: str, config: RunConfig) -> str:
    """What the result of a stage depends on, as one hash."""
    stage = STAGES[name]
    facts = {
        "stage": name,
        "config": {section: to_tree(getattr(config, section)) for section in stage.sections},
        "after": [fingerprint(earlier, config) for earlier in stage.after],
        "sources": [_source_facts(source, config) for source in stage.sources],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _source_facts(source: str, config: RunConfig) -> list[str]:
    """Names, sizes and versions of the files that a run starts from."""
    if source == "data":
        store = Store.open(config.data.source, config.storage)
        return [store.fingerprint(pattern) for pattern in (config.data.train, config.data.heldout)]
    if config.model.pipeline.startswith("package:"):
        return [config.model.pipeline]
    store = Store.open(config.model.pipeline, config.storage)
    return [store.fingerprint(pattern) for pattern in MODEL_FILES]


def _record(name: str) -> str:
    """Where a stage's fingerprint is kept from its start, and its summary once it is done.

    Outside the stage's own folder, because a release lists every file in its folder.
    """
    return f"{layout.RECORDS}/{name}.json"


def _read(root: Store, name: str) -> dict[str, Any] | None:
    return root.read_json(_record(name)) if root.exists(_record(name)) else None


def _brief(summary: Summary) -> str:
    return ", ".join(f"{key} {value}" for key, value in summary.items() if isinstance(value, (int, float, str)))
