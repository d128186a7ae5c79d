"""Prompt-tailored pruning of text-to-image diffusion models (APTP, arXiv 2406.12042) on stock diffusers modules.

Read the modules in this order; each imports only what stands above it, and data takes the same way:

    latents, prompts        captioned images become latents, text states and sentence embeddings
    codes                   the waist: a pruning space, and an architecture code in it
    backbones, sites        the space of an unmodified network, read from the network itself
    gates, slicing, cost    a network that obeys a code, the smaller network that equals it, and what that costs
    expert                  a sliced network on disk
    relax, transport        bits with gradients; balanced assignment
    router                  prompts to codes
    losses, pruning         stage 1: router and codes are learned on the frozen, gated network
    baselines               codes that other methods choose at the same budget
    finetuning              stage 2: each expert learns from its own prompts and from the full network
    release, pipeline       all of it in one folder, and images out of that folder
    metrics, analysis       what it is worth, and what the router has learned
"""

from aptp.baselines import block_removal_code, magnitude_code, random_code, random_routing, uniform_code
from aptp.codes import ArchitectureCode, PruningSpace, Site
from aptp.cost import CostTable, cost_table
from aptp.expert import load_expert, read_expert_info, save_expert
from aptp.finetuning import FinetuningConfig, FinetuningStage
from aptp.gates import block_features, gated
from aptp.latents import Batch, encode_images, encode_texts
from aptp.losses import LossTerms, NoiseSchedule
from aptp.pipeline import AptpOutput, AptpPipeline
from aptp.prompts import PromptEncoder
from aptp.pruning import PruningConfig, PruningStage, calibrate_budget
from aptp.release import Release, ReleaseInfo, read_release, write_release
from aptp.router import Router, RouterConfig, Routes
from aptp.sites import Granule, read_space
from aptp.slicing import slice_unet

__all__ = [
    "AptpOutput",
    "AptpPipeline",
    "ArchitectureCode",
    "Batch",
    "CostTable",
    "FinetuningConfig",
    "FinetuningStage",
    "Granule",
    "LossTerms",
    "NoiseSchedule",
    "PromptEncoder",
    "PruningConfig",
    "PruningSpace",
    "PruningStage",
    "Release",
    "ReleaseInfo",
    "Router",
    "RouterConfig",
    "Routes",
    "Site",
    "block_features",
    "block_removal_code",
    "calibrate_budget",
    "cost_table",
    "encode_images",
    "encode_texts",
    "gated",
    "load_expert",
    "magnitude_code",
    "random_code",
    "random_routing",
    "read_expert_info",
    "read_release",
    "read_space",
    "save_expert",
    "slice_unet",
    "uniform_code",
    "write_release",
]
