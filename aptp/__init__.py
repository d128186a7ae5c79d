"""Prompt-tailored pruning of text-to-image diffusion models (APTP, arXiv 2406.12042) on stock diffusers modules.

Read the modules in this order; each imports only what stands above it, and data takes the same way:

    latents, prompts        captioned images become latents, text states and sentence embeddings
    codes                   the waist: a pruning space, and an architecture code in it
    backbones, sites        the space of an unmodified network, read from the network itself
    gates, slicing, cost    a network that obeys a code, the smaller network that equals it, and what that costs
    expert                  a sliced network on disk
    noise                   random numbers as functions of seed, step, row and use
    relax, transport        bits with gradients; prompts shared out over codes
    need                    what a prompt loses under each code, measured and predicted
    routes, router          prompts to codes
    losses, objectives      the terms that the two stages minimise, and their weights
    pruning, calibration    stage 1: router and codes are learned on the frozen, gated network, then put on budget
    baselines               codes that other methods choose at the same budget
    finetuning, sharing     stage 2: each expert learns from its own prompts and from the full network; before it, if
                            wanted, one set of weights learns under all codes
    release                 all of it in one folder, written and read
    pipeline                images out of that folder
    metrics, analysis       what it is worth, and what the router has learned
    cli                     the command `aptp`: what a release holds, and images from it

A name is imported when it is first used (PEP 562): who reads a release's manifest does not wait for diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aptp.analysis import (
        GroupBudget,
        budget_by_group,
        draw_kept_blocks,
        hardest_prompts,
        kept_by_block,
        words_by_code,
    )
    from aptp.baselines import block_removal_code, magnitude_code, random_code, random_routing, uniform_code
    from aptp.calibration import Calibration, calibrate_budget, set_price
    from aptp.codes import ArchitectureCode, PruningSpace, Site
    from aptp.cost import CostTable, cost_table, count_macs
    from aptp.expert import BaseModel, ExpertInfo, load_expert, read_expert_info, save_expert
    from aptp.finetuning import FinetuningStage
    from aptp.gates import Gates, block_features, gated
    from aptp.latents import Batch, encode_images, encode_texts
    from aptp.losses import LossTerms, NoiseSchedule
    from aptp.metrics import (
        FeatureStatistics,
        clip_score,
        frechet_distance,
        maximum_mean_discrepancy,
        paired_denoising_loss,
    )
    from aptp.need import NeedConfig, NeedHead, Observations, fit_need
    from aptp.noise import Noise
    from aptp.objectives import FinetuningConfig, PruningConfig
    from aptp.pipeline import AptpOutput, AptpPipeline
    from aptp.prompts import PromptEncoder
    from aptp.pruning import PruningStage
    from aptp.release import BrokenReleaseError, Release, ReleaseInfo, read_release, write_release
    from aptp.router import Router
    from aptp.routes import RouterConfig, Routes, UnusedCodeError
    from aptp.sharing import SharingStage
    from aptp.sites import Granule, any_order, outermost_first, read_space
    from aptp.slicing import slice_unet

_HOMES: Final = {
    "latents": ("Batch", "encode_images", "encode_texts"),
    "prompts": ("PromptEncoder",),
    "codes": ("ArchitectureCode", "PruningSpace", "Site"),
    "sites": ("Granule", "any_order", "outermost_first", "read_space"),
    "gates": ("Gates", "block_features", "gated"),
    "slicing": ("slice_unet",),
    "cost": ("CostTable", "cost_table", "count_macs"),
    "expert": ("BaseModel", "ExpertInfo", "load_expert", "read_expert_info", "save_expert"),
    "noise": ("Noise",),
    "need": ("NeedConfig", "NeedHead", "Observations", "fit_need"),
    "routes": ("RouterConfig", "Routes", "UnusedCodeError"),
    "router": ("Router",),
    "losses": ("LossTerms", "NoiseSchedule"),
    "objectives": ("FinetuningConfig", "PruningConfig"),
    "pruning": ("PruningStage",),
    "calibration": ("Calibration", "calibrate_budget", "set_price"),
    "baselines": ("block_removal_code", "magnitude_code", "random_code", "random_routing", "uniform_code"),
    "finetuning": ("FinetuningStage",),
    "sharing": ("SharingStage",),
    "release": ("BrokenReleaseError", "Release", "ReleaseInfo", "read_release", "write_release"),
    "pipeline": ("AptpOutput", "AptpPipeline"),
    "metrics": (
        "FeatureStatistics",
        "clip_score",
        "frechet_distance",
        "maximum_mean_discrepancy",
        "paired_denoising_loss",
    ),
    "analysis": (
        "GroupBudget",
        "budget_by_group",
        "draw_kept_blocks",
        "hardest_prompts",
        "kept_by_block",
        "words_by_code",
    ),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)

if not TYPE_CHECKING:  # a type checker reads the imports above, and finds misspelt names by them

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'aptp' has no attribute {name!r}")
        value = getattr(import_module(f"aptp.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
