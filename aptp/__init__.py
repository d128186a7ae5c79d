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

`__init__.pyi` lists the public names. A name is imported when it is first used (PEP 562), so that reading a release's
manifest does not wait for diffusers.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
