"""The stages of a run, in their order: what each is submitted as, writes, reads, and depends on."""

from collections.abc import Collection
from dataclasses import dataclass

from aptp_platform.run import layout


@dataclass(frozen=True)
class Stage:
    """One step of the path."""

    name: str
    script: str  # the file in jobs/ that is submitted for it
    folder: str  # under the run's root; written by this stage alone
    sections: tuple[str, ...]  # of the config: what the result depends on, but for the fields in `facts.FREE`
    after: tuple[str, ...]  # stages whose folders it reads
    entry: str  # "module:function" taking a RunConfig and returning a summary; imported when the stage runs
    sources: tuple[str, ...] = ()  # "data", "encoders", "network", "features": files outside the run that it reads


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "encode",
            "encode_latents",
            layout.ENCODED,
            ("data", "encode"),
            (),
            "data.encode:encode",
            ("data", "encoders"),
        ),
        Stage(
            "prune",
            "prune_unet",
            layout.PRUNED,
            ("seed", "model", "router", "space", "prune"),
            ("encode",),
            "train.trainer:prune",
            ("network",),
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
            ("features",),
        ),
        Stage(
            "publish", "publish_release", layout.RELEASE, (), ("assign", "refit", "evaluate"), "experts.publish:publish"
        ),
    )
}


def readers_of(stages: Collection[str]) -> frozenset[str]:
    """The stages that read what these have made, at any remove."""
    found: set[str] = set()
    for stage in STAGES.values():
        if not {*stages, *found}.isdisjoint(stage.after):
            found.add(stage.name)
    return frozenset(found)
