"""Where a run keeps what its stages make: the folders under its root, and the names in them.

encoded/{train,heldout}/   Parquet files of latents, captions and sentence embeddings
pruned/router/             router and codes as they were learned; checkpoints/, curves/ and tensorboard/ beside it
shared/                    router/ and, if share.run.steps is not 0, unet/; what is beside as in pruned/
assigned/                  the router with the codes that are kept, and a file of codes for each encoded file
cut/00/ ... cut/uniform/   one network per code and per baseline
finetuned/00/ ...          the same networks after training; what is beside as in pruned/
refitted/router/           the router, fitted to the experts as they are after training
evaluated/                 metrics, scores, figures, report
comparison/                of an experiment, whose runs are in runs/: metrics, figures, report
release/                   what a server reads
tune/                      one folder per trial of a sweep, each laid out as a root; what the sweep found beside them
stages/                    one record per stage: what it depends on, and its summary once it is done
aside/                     what restarts of stages have put aside
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Final

from aptp_platform.storage.store import Store

if TYPE_CHECKING:
    from aptp.router import Router
    from aptp_platform.config import RunConfig

ENCODED: Final = "encoded"
TRAIN_ROWS: Final = "encoded/train"
HELD_OUT_ROWS: Final = "encoded/heldout"
PRUNED: Final = "pruned"
SHARED: Final = "shared"
ASSIGNED: Final = "assigned"
CUT: Final = "cut"
FINETUNED: Final = "finetuned"
REFITTED: Final = "refitted"
EVALUATED: Final = "evaluated"
COMPARISON: Final = "comparison"
RELEASE: Final = "release"
TRIALS: Final = "tune"
RECORDS: Final = "stages"
ASIDE: Final = "aside"
ROUTER: Final = "router"  # in the folders of pruned, shared, assigned and refitted
UNET: Final = "unet"  # in the folder of shared
CHECKPOINTS: Final = "checkpoints"  # in the folders of the three trainings, as are the next two
CURVES: Final = "curves"
RUN: Final = "run.json"  # in a training's checkpoints: what it depends on, and once it is finished its steps
TENSORBOARD: Final = "tensorboard"


def network_of(code: int) -> str:
    """The name of a code's network in `cut/` and `finetuned/`."""
    return f"{code:02d}"


def trained_steps(root: Store, network: str) -> int:
    """How many steps a network of `finetuned/` was trained."""
    return root.join(FINETUNED, CHECKPOINTS, network).read_json(RUN)["steps"]


def home(config: RunConfig, stage: str) -> Store:
    """The root under which a stage's folder is read: this run's own, or that of the run that `reuse` names."""
    return Store.open(getattr(config.reuse, stage, None) or config.root, config.storage)


def assigned_router(config: RunConfig) -> Router:
    """The router that says which codes are cut, and which prompts their experts are trained on."""
    return _router(home(config, "assign").join(ASSIGNED))


def refitted_router(config: RunConfig) -> Router:
    """The router of the trained experts: what is evaluated and served."""
    return _router(home(config, "refit").join(REFITTED))


def _router(folder: Store) -> Router:
    from aptp.router import Router  # torch, which the drivers that only start jobs do without

    with tempfile.TemporaryDirectory() as scratch:
        return Router.load(folder.fetch(ROUTER, scratch))
