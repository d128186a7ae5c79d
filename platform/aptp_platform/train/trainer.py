"""Training specs as Ray Train jobs: what is checked before, the worker groups, and the two entry points.

A worker group is one `TorchTrainer`. Running it again under the same folder and name goes on from its last checkpoint,
whatever ended it; one that had finished is not run again.
"""

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import floor
from typing import Any

import ray
import ray.cloudpickle as cloudpickle
import torch
from diffusers import UNet2DConditionModel
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig as TrainRunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from aptp.cost import cost_table
from aptp_platform.config import ConfigError, EncodeConfig, RunConfig, TrainingConfig
from aptp_platform.data.captions import source_files
from aptp_platform.data.encoded import latent_size
from aptp_platform.models import check_pipeline, pruning_space
from aptp_platform.run.facts import differences
from aptp_platform.run.layout import (
    ASSIGNED,
    CHECKPOINTS,
    FINETUNED,
    PRUNED,
    ROUTER,
    RUN,
    SHARED,
    TRAIN_ROWS,
    UNET,
    assigned_router,
    home,
    network_of,
)
from aptp_platform.run.progress import Progress
from aptp_platform.run.resources import require_room
from aptp_platform.storage.store import Store
from aptp_platform.train.engine import check_engine
from aptp_platform.train.loop import LASTING, SCORE, EndAtOnce, Summary, TrainingSpec, train
from aptp_platform.train.sharing import ShareSpec
from aptp_platform.train.source import Source
from aptp_platform.train.specs import FinetuneSpec, PruneSpec
from aptp_platform.train.stream import READER_CPUS, READERS, Stream, files_by_code, files_of


def prune(config: RunConfig, teacher: Mapping[str, float] | None = None, callbacks: Sequence[Any] = ()) -> Summary:
    """Learn the router and the codes; publishes `pruned/router/`.

    Args:
        teacher: the full model's losses on held-out rows, by key; unset: they are measured where they are needed.
        callbacks: Ray Train's; they get what each checkpoint reports.
    """
    root = Store.open(config.root, config.storage)
    check_group(config.prune.run, "prune.run", config.encode)
    stream = _stream(config, config.prune.run)
    check_shape(config, stream)
    return fit(PruneSpec(config, stream, teacher or {}), root.join(PRUNED, CHECKPOINTS), ROUTER, callbacks)


def share(config: RunConfig, teacher: Mapping[str, float] | None = None, callbacks: Sequence[Any] = ()) -> Summary:
    """Train the network's weights under the gates of all codes; publishes `shared/`.

    Without steps there is no such training: the router is handed on as it is.

    Args:
        teacher, callbacks: as for `prune`.
    """
    root = Store.open(config.root, config.storage)
    if not config.share.run.steps:
        with tempfile.TemporaryDirectory() as scratch:
            router = home(config, "prune").join(PRUNED).fetch(ROUTER, scratch)
            root.join(SHARED).publish(router, ROUTER, last=("router.json",))
        return {"steps": 0}
    check_group(config.share.run, "share.run", config.encode)
    stream = _stream(config, config.share.run)
    return fit(ShareSpec(config, stream, teacher or {}), root.join(SHARED, CHECKPOINTS), UNET, callbacks)


def finetune(config: RunConfig) -> Summary:
    """Fine-tune every cut network, side by side as the cluster allows; publishes `finetuned/<network>/`."""
    root = Store.open(config.root, config.storage)
    assigned = home(config, "assign").join(ASSIGNED)
    check_group(config.finetune.run, "finetune.run", config.encode)
    everything = _stream(config, config.finetune.run)
    files = files_by_code(assigned, assigned_router(config).num_codes)
    streams = {
        network_of(code): replace(everything, files=mine, assigned=assigned, code=code)
        for code, mine in enumerate(files)
    }
    counts = expert_steps(config, [sum(file.rows for file in mine) for mine in files])
    steps = dict(zip(streams, counts, strict=True))
    streams |= dict.fromkeys(config.cut.baselines, everything)
    specs = {
        network: FinetuneSpec(config, stream, network, steps.get(network, config.finetune.run.steps))
        for network, stream in streams.items()
    }
    at_once = _groups_at_once(config.finetune.run, config.encode)
    summaries = fit_all(specs, root.join(FINETUNED, CHECKPOINTS), at_once)
    return {"networks": len(summaries), "summaries": summaries}


def expert_steps(config: RunConfig, rows: Sequence[int]) -> list[int]:
    """How many steps each expert trains, by the rows that it trains on.

    `finetune.steps_of: mean` means `router.num_codes` times `finetune.run.steps` in all, also where codes were merged:
    shared out by rows, every prompt is seen equally often.
    """
    settings = config.finetune
    if settings.steps_of == "each":
        return [settings.run.steps] * len(rows)
    total = settings.run.steps * config.router.num_codes
    return [max(1, round(total * count / sum(rows))) for count in rows]


def fit(spec: TrainingSpec, runs: Store, name: str, callbacks: Sequence[Any] = ()) -> Summary:
    """Run one spec's worker group to its end, or go on with it; returns the summary of its rank 0.

    Args:
        runs: the folder of this run's folder, which Ray Train fills with checkpoints.

    Raises:
        ConfigError: the folder holds checkpoints of another config.
        TrainingFailedError: it failed more often than `max_failures`.
    """
    run = runs.join(name)
    depends_on = dict(spec.depends_on())
    if run.exists(RUN):
        before = run.read_json(RUN)
        if found := differences(before["config"], depends_on):
            raise ConfigError(
                f"{run.uri}: its checkpoints belong to another config ({'; '.join(found[:3])}): give the run a root of "
                "its own, or start the stage anew with --restart"
            )
        if before.get("steps") == spec.training.steps:
            return before["summary"]
    run.write_json(RUN, {"config": depends_on})
    summary = _run_group(spec, runs, name, callbacks)
    run.write_json(RUN, {"config": depends_on, "steps": spec.training.steps, "summary": summary})
    return summary


def fit_all(specs: Mapping[str, TrainingSpec], runs: Store, at_once: int) -> list[Summary]:
    """Run a worker group for each name, `at_once` side by side; one that failed is run again alone."""
    summaries: dict[str, Summary] = {}
    with ThreadPoolExecutor(at_once) as threads, Progress("finetune", len(specs)) as progress:
        progress.update(0)
        running = {name: threads.submit(fit, spec, runs, name) for name, spec in specs.items()}
        for name, summary in running.items():
            try:
                summaries[name] = summary.result()
            except TrainingFailedError:
                continue  # its turn comes again when the others are done
            progress.update(len(summaries))
    for name, spec in specs.items():
        if name not in summaries:
            print(f"[{spec.name}] failed beside the others: once more alone", flush=True)
            summaries[name] = fit(spec, runs, name)
    return [summaries[name] for name in specs]


def check_group(training: TrainingConfig, where: str, encode: EncodeConfig) -> None:
    """ConfigError if the cluster can never run this worker group, or its engine's settings exclude each other."""
    beside = READER_CPUS + training.workers * _encoders(encode)["CPU"]
    check_engine(training, where)
    shares = {
        "CPU": ("cpus_per_worker", training.cpus_per_worker),
        "GPU": ("gpus_per_worker", training.gpus_per_worker),
    }
    require_room(where, "workers", training.workers, shares, spare=beside)


def check_shape(
    config: RunConfig, stream: Stream, fields: tuple[str, str] = ("router.num_codes", "router.budget")
) -> None:
    """ConfigError if there are fewer prompts than codes, or the budget is below what this UNet can be pruned to.

    Args:
        fields: what sets the two.
    """
    num_codes, budget = config.router.num_codes, config.router.budget
    if num_codes > sum(file.rows for file in stream.files) and num_codes > (prompts := stream.num_captions()):
        raise ConfigError(f"{fields[0]}: {num_codes}: there are only {prompts} prompts: set it to at most {prompts}")
    folder = check_pipeline(config.model, config.storage)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    tokens = config.model.num_text_tokens or 77
    space = pruning_space(unet, config.space)
    table = cost_table(unet, space, latent_size=latent_size(stream.encoded), num_text_tokens=tokens)
    if budget < table.minimum:
        raise ConfigError(
            f"{fields[1]}: {budget}: this UNet cannot be pruned below {table.minimum:.3f} of its MACs: set a budget "
            f"of at least {table.minimum + 0.01:.2f}"
        )


def check_reach(config: RunConfig, most_codes: int, least_budget: float, fields: tuple[str, str]) -> None:
    """As `check_shape`, for the ends of what a sweep tries on this run's rows."""
    ends = replace(config, router=replace(config.router, num_codes=most_codes, budget=least_budget))
    check_shape(ends, _stream(ends, config.prune.run), fields)


def _stream(config: RunConfig, training: TrainingConfig) -> Stream:
    """All encoded training rows."""
    encoded, source = home(config, "encode").join(TRAIN_ROWS), None
    if not config.encode.cache_latents:
        names = tuple(file.name for file in source_files(config.data, config.storage) if file.split == "train")
        source = Source(config.data, config.storage, config.model, config.encode, names)
    return Stream(
        encoded,
        files_of(encoded),
        config.seed,
        window_rows=training.window_rows,
        prefetch_bytes=training.prefetch_bytes,
        source=source,
    )


def _run_group(spec: TrainingSpec, runs: Store, name: str, callbacks: Sequence[Any]) -> Summary:
    training = spec.training
    resources = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker}
    filesystem, path = runs.arrow()
    trainer: Any = TorchTrainer(
        train,  # type: ignore[arg-type]
        train_loop_config={"spec": cloudpickle.dumps(spec)},
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=training.gpus_per_worker > 0,
            resources_per_worker={resource: amount for resource, amount in resources.items() if amount},
        ),
        run_config=TrainRunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=training.checkpoints_kept,
                checkpoint_score_attribute=SCORE,
                checkpoint_score_order="min",
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[*callbacks, EndAtOnce()],  # type: ignore[list-item]
        ),
    )
    cause: Any
    try:
        return trainer.fit().return_value
    except ControllerError as error:
        cause = error.controller_failure
        while isinstance(cause, ControllerError):
            cause = cause.controller_failure
        if isinstance(cause, LASTING):
            raise ConfigError(str(cause)) from error
        raise
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, ValueError):
                raise ConfigError(str(cause)) from error
            if isinstance(cause, ray.exceptions.OutOfDiskError):
                raise cause from error
        raise


def _encoders(encode: EncodeConfig) -> dict[str, float]:
    """What a worker's own encoders take, if it has some in front of it."""
    actors = 0 if encode.cache_latents else encode.actors
    return {"CPU": actors * encode.cpus_per_actor, "GPU": actors * encode.gpus_per_actor}


def _groups_at_once(training: TrainingConfig, encode: EncodeConfig) -> int:
    """How many worker groups, each with what feeds it, fit into the cluster as it is now."""
    room: dict[str, float] = ray.cluster_resources()
    encoders = _encoders(encode)
    needs = {
        "CPU": training.workers * (training.cpus_per_worker + READERS * READER_CPUS + encoders["CPU"]),
        "GPU": training.workers * (training.gpus_per_worker + encoders["GPU"]),
    }
    return max(1, min(floor(room.get(resource, 0.0) / need) for resource, need in needs.items() if need))
