"""What a stage's result depends on, as plain data: config fields, files outside the run, the stages before it.

No more: how many workers or actors compute it, how much memory they take and how often they save does not change it.
And no less: `sources` says how the files count.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from aptp_platform.config import RunConfig
from aptp_platform.config_file import to_tree
from aptp_platform.run.sources import DataFiles, data_facts, data_files, encoder_facts, folder_facts, network_facts
from aptp_platform.run.stages import STAGES

# Fields of a training (`*.run`) that do not change its steps.
FREE_IN_TRAINING = (
    "prefetch_bytes", "workers", "cpus_per_worker", "gpus_per_worker", "max_failures", "checkpoint_every",
    "checkpoints_kept", "heldout_rows", "engine.zero_stage", "engine.offload", "engine.activation_checkpointing",
)  # fmt: skip
FREE = frozenset(
    [
        # Places: the files count, wherever they are.
        "data.source", "data.train", "data.heldout", "model.pipeline", "model.text_encoder", "model.prompt_encoder",
        "data.max_bad_share",
        "encode.batch_size", "encode.readers", "encode.actors", "encode.cpus_per_actor", "encode.gpus_per_actor",
        "refit.batch_size", "refit.cpus_per_task", "refit.gpus_per_task",
        "evaluate.cpus_per_network", "evaluate.gpus_per_network",
        *(f"{stage}.run.{field}" for stage in ("prune", "share", "finetune") for field in FREE_IN_TRAINING),
    ]
)  # fmt: skip
OLD_RECORD = "its record is of an older version, which did not say what the result was made from"


class Facts:
    """What the stages of one config depend on. Each source is listed once, when it is first asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._known: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, dict[str, Any]] = {}

    @cached_property
    def data(self) -> DataFiles:
        """The files of captioned images."""
        return data_files(self.config.data, self.config.storage)

    def of(self, stage: str) -> dict[str, Any]:
        """Three trees: `config`, `sources`, and `after`: the fingerprints of the stages before it.

        Raises:
            StoreError: a source is missing or cannot be listed.
        """
        if stage not in self._known:
            known = STAGES[stage]
            self._known[stage] = {
                "config": {section: section_facts(self.config, section) for section in known.sections},
                "sources": {k: v for source in known.sources for k, v in self._source(source).items()},
                "after": {earlier: self.fingerprint(earlier) for earlier in known.after},
            }
        return self._known[stage]

    def fingerprint(self, stage: str) -> str:
        """`of` as one hash."""
        text = json.dumps([stage, self.of(stage)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def inputs(self) -> str:
        """All sources of the run, and how its rows are encoded, as one hash."""
        facts = [self.of("encode"), self._source("network")]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _source(self, source: str) -> dict[str, Any]:
        if source not in self._sources:
            config = self.config
            features = config.evaluate.features.partition(":")[2]
            listed: dict[str, Callable[[], dict[str, Any]]] = {
                "data": lambda: data_facts(self.data),
                "encoders": lambda: encoder_facts(config.model, config.storage),
                "network": lambda: network_facts(config.model, config.storage),
                "features": lambda: folder_facts("evaluate.features", features, config.storage) if features else {},
            }
            self._sources[source] = listed[source]()
        return self._sources[source]


def section_facts(config: RunConfig, section: str) -> Any:
    """A section without the fields that no result depends on."""
    if section == "share" and not config.share.run.steps:
        return {"run": {"steps": 0}}  # the router is handed on, whatever the rest says
    tree = to_tree(getattr(config, section))
    if section == "evaluate":
        tree["features"] = config.evaluate.features.partition(":")[0]
    return _without(tree, section)


def _without(tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without(value, f"{where}.{key}") for key, value in tree.items() if f"{where}.{key}" not in FREE}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two trees of plain data differ."""
    return [f"{field}: {before!r}, now {now!r}" for field, before, now in _pairs(old, new, where)]


def changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What has changed of the config and the files that a stage depends on, each as a few words."""
    if before is None:
        return [OLD_RECORD]
    told = differences(before["config"], now["config"])
    for source in {**before["sources"], **now["sources"]}:
        was, found = (facts["sources"].get(source) for facts in (before, now))
        if was != found:
            told.append(f"{source}: {_amount(was)}, now {_amount(found)}{_same(was, found)}")
    return told


def only_longer(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether nothing has changed but that a training has more steps, which go on from its last checkpoint.

    If its learning rate falls to the last step, more steps change all of them.
    """
    if before is None or before["sources"] != now["sources"] or before["after"] != now["after"]:
        return False
    found = list(_pairs(before["config"], now["config"], ""))
    return bool(found) and all(
        field.endswith(".run.steps")
        and 0 < was < steps
        and now["config"][field.split(".")[0]]["run"]["final_learning_rate"] is None
        for field, was, steps in found
    )


def _pairs(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _pairs(old.get(key), new.get(key), f"{where}.{key}".strip("."))
    elif old != new:
        yield where, old, new


def _amount(facts: Any) -> str:
    if isinstance(facts, dict):
        return f"{facts['files']} file{'s'[: facts['files'] != 1]} of {facts['bytes']} bytes"
    return "nothing" if facts is None else str(facts)


def _same(was: Any, found: Any) -> str:
    """Where the amounts do not tell."""
    return " that were changed or renamed" if _amount(was) == _amount(found) else ""
