from .analysis import (
    GroupBudget as GroupBudget,
    budget_by_group as budget_by_group,
    draw_kept_blocks as draw_kept_blocks,
    hardest_prompts as hardest_prompts,
    kept_by_block as kept_by_block,
    words_by_code as words_by_code,
)
from .baselines import (
    block_removal_code as block_removal_code,
    magnitude_code as magnitude_code,
    random_code as random_code,
    random_routing as random_routing,
    uniform_code as uniform_code,
)
from .calibration import Calibration as Calibration, calibrate_budget as calibrate_budget, set_price as set_price
from .codes import ArchitectureCode as ArchitectureCode, PruningSpace as PruningSpace, Site as Site
from .cost import CostTable as CostTable, cost_table as cost_table, count_macs as count_macs
from .expert import (
    BaseModel as BaseModel,
    ExpertInfo as ExpertInfo,
    load_expert as load_expert,
    read_expert_info as read_expert_info,
    save_expert as save_expert,
)
from .finetuning import FinetuningStage as FinetuningStage
from .gates import Gates as Gates, block_features as block_features, gated as gated
from .latents import Batch as Batch, encode_images as encode_images, encode_texts as encode_texts
from .losses import LossTerms as LossTerms, NoiseSchedule as NoiseSchedule
from .metrics import (
    FeatureStatistics as FeatureStatistics,
    clip_score as clip_score,
    frechet_distance as frechet_distance,
    maximum_mean_discrepancy as maximum_mean_discrepancy,
    paired_denoising_loss as paired_denoising_loss,
)
from .need import (
    NeedConfig as NeedConfig,
    NeedHead as NeedHead,
    Observations as Observations,
    fit_need as fit_need,
)
from .noise import Noise as Noise
from .objectives import FinetuningConfig as FinetuningConfig, PruningConfig as PruningConfig
from .pipeline import AptpOutput as AptpOutput, AptpPipeline as AptpPipeline
from .prompts import PromptEncoder as PromptEncoder
from .pruning import PruningStage as PruningStage
from .release import (
    BrokenReleaseError as BrokenReleaseError,
    Release as Release,
    ReleaseInfo as ReleaseInfo,
    read_release as read_release,
    write_release as write_release,
)
from .router import Router as Router
from .routes import RouterConfig as RouterConfig, Routes as Routes, UnusedCodeError as UnusedCodeError
from .sharing import SharingStage as SharingStage
from .sites import (
    Granule as Granule,
    any_order as any_order,
    outermost_first as outermost_first,
    read_space as read_space,
)
from .slicing import slice_unet as slice_unet

__all__: list[str]
__version__: str
