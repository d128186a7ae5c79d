"""The models a run starts from: a stock diffusers folder and the encoders beside it, fetched, checked and loaded."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from aptp.codes import PruningSpace
from aptp.sites import Granule, any_order, outermost_first, read_space
from aptp_platform.config import PACKAGE, ModelConfig, SpaceSection, StorageConfig
from aptp_platform.pipeline_folder import check_folder, load_scheduler, read_json, require_part, weights_variant
from aptp_platform.storage.errors import DamagedError
from aptp_platform.storage.store import Store


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a Stable Diffusion pipeline: fp32, evaluation mode, no gradients."""

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def pipeline(self, unet: Any = None) -> diffusers.StableDiffusionPipeline:
        """The stock pipeline of these parts, with another UNet in the place of theirs if one is given."""
        return diffusers.StableDiffusionPipeline(
            unet=self.unet if unet is None else unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def fetch_model(spec: str, storage: StorageConfig) -> Path:
    """A model folder on this machine.

    Args:
        spec: a path, a URI, or `package:NAME`: a Python package that holds a model and a function `get_model_path()`.
            What comes from a bucket is kept in the machine's temporary folder, under the fingerprint of its files.

    Raises:
        ValueError: it is not there, or the package is not installed.
    """
    if spec.startswith(PACKAGE):
        return _package_folder(spec.removeprefix(PACKAGE))
    store = Store.open(spec, storage)
    if store.is_local:
        if Path(store.uri).is_file():
            raise ValueError(
                f"{spec}: is a file; convert it to a folder: diffusers.StableDiffusionPipeline.from_single_file(FILE)"
                ".save_pretrained(FOLDER)"
            )
        if not Path(store.uri).is_dir():
            raise ValueError(f"{spec}: is no folder; name a model folder, a URI or package:NAME")
        return Path(store.uri)
    store.require("**", "model")
    digest = hashlib.sha256(f"{store.uri} {store.fingerprint()}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "aptp-models" / digest
    parent, _, name = store.uri.rpartition("/")
    if not (folder / name).is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=folder.parent))
        try:
            Store.open(parent, storage).fetch(name, own)
            own.chmod(0o755)
            with contextlib.suppress(OSError):  # another process was here first: its copy is the same
                own.rename(folder)
            if not (folder / name).is_dir():
                raise ValueError(f"{folder}: cannot be made: make room, or check the folder's permissions")
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return folder / name


def check_pipeline(config: ModelConfig, storage: StorageConfig) -> Path:
    """The pipeline's folder on this machine, sure to hold every part that the run loads from it; no weight is loaded.

    Raises:
        ValueError: a part is missing or is none that the stages can use; the line names it.
    """
    folder = fetch_model(config.pipeline, storage)
    needed = ["unet", "vae", "scheduler"]
    if config.text_encoder is None:
        needed += ["text_encoder", "tokenizer"]
    check_folder(folder, needed, config.pipeline)
    if config.text_encoder is not None:
        weights_variant(fetch_model(config.text_encoder, storage))
    encoder = fetch_model(config.prompt_encoder, storage)
    if variant := weights_variant(encoder):  # the library loads it, as it is, for every release
        raise ValueError(f"{encoder}: holds *.{variant}.safetensors alone; save it again without a variant")
    return folder


def load_pipeline_parts(config: ModelConfig, storage: StorageConfig) -> PipelineParts:
    """Load the pipeline: fp32, evaluation mode, safetensors only, with the configured text encoder in it.

    Raises:
        ValueError: a part is missing or cannot be loaded, or `model.num_text_tokens` is more than the encoder reads.
    """
    folder = check_pipeline(config, storage)
    tokenizer, text_encoder = _load_text_encoder(config, storage, folder)
    unet = _load(diffusers.UNet2DConditionModel, folder, "unet", config)
    width = getattr(text_encoder.config, "hidden_size", None)
    if width != unet.config.cross_attention_dim:
        raise ValueError(
            f"model.text_encoder: {config.text_encoder or config.pipeline}: has states of width {width}, the UNet "
            f"reads {unet.config.cross_attention_dim}: name the text encoder that the UNet was trained with"
        )
    return PipelineParts(
        unet=unet,
        vae=_load(diffusers.AutoencoderKL, folder, "vae", config),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=load_scheduler(folder),
    )


def load_vae(config: ModelConfig, storage: StorageConfig) -> diffusers.AutoencoderKL:
    """The pipeline's autoencoder alone, as `load_pipeline_parts` loads it."""
    return _load(diffusers.AutoencoderKL, fetch_model(config.pipeline, storage), "vae", config)


def pruning_space(unet: torch.nn.Module, section: SpaceSection) -> PruningSpace:
    """What a run may prune of a network.

    Raises:
        ValueError: the granule does not divide a layer, or the network is of a class that is not known.
    """
    order = {"outermost_first": outermost_first, "any_order": any_order}[section.order]
    granule = Granule(section.granule.groups, section.granule.heads, section.granule.hidden)
    return read_space(unet, granule=granule, depth=section.depth, depth_order=order)


def _load_text_encoder(config: ModelConfig, storage: StorageConfig, folder: Path) -> tuple[Any, Any]:
    if config.text_encoder is None:
        tokenizer = load_tokenizer(folder / "tokenizer")
        name = (read_json(folder / "text_encoder" / "config.json").get("architectures") or ["AutoModel"])[0]
        if not hasattr(transformers, name):
            raise ValueError(f"{folder / 'text_encoder'}: is a {name}, which transformers does not know; name another")
        model = _load(getattr(transformers, name), folder, "text_encoder", config)
    else:
        own = fetch_model(config.text_encoder, storage)
        tokenizer = load_tokenizer(own)
        model = _load(transformers.AutoModel, own, "", config)
        if not model.config.model_type.startswith("clip") and not hasattr(model.config, "use_attention_mask"):
            model.config.use_attention_mask = True  # all but CLIP are trained with their padding masked
    if config.num_text_tokens is not None:
        limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
        if not 2 < config.num_text_tokens <= limit:
            raise ValueError(f"model.num_text_tokens: {config.num_text_tokens}: must be in 3..{limit}, what it reads")
        tokenizer.model_max_length = config.num_text_tokens
    return tokenizer, model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder as transformers saves it.

    Raises:
        ValueError: there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers' own loaders raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: holds no tokenizer ({type(error).__name__}: {reason}); save it again") from None


def _load(kind: Any, folder: Path, part: str, config: ModelConfig) -> Any:
    if part:
        require_part(folder, part, config.pipeline)
    return load_whole(kind, folder / part)


def load_whole(kind: Any, folder: Path) -> Any:
    """A network of this class from a folder of safetensors: fp32, evaluation mode, no gradients, every tensor a file's.

    Raises:
        DamagedError: a file is damaged, or lacks a tensor that the network has.
        ValueError: it does not load.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if kind.__module__.startswith("diffusers"):  # which warns at length where `accelerate` is not installed
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    options["variant"] = weights_variant(folder)
    try:
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: does not load as {kind.__name__} from safetensors: {reason}; save it again with "
            "save_pretrained(..., safe_serialization=True)"
        ) from None
    if missing := sorted(map(str, found["missing_keys"])):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DamagedError(
            f"{folder}: its files lack {missing[0]}{more}, which a {kind.__name__} has; it would be made up: copy or "
            "save the model again"
        )
    return model.eval().requires_grad_(False)


def _package_folder(name: str) -> Path:
    try:
        return Path(importlib.import_module(name).get_model_path())
    except ImportError:
        raise ValueError(f"{PACKAGE}{name}: that package is not installed: pip install {name}") from None
    except AttributeError:
        raise ValueError(f"{PACKAGE}{name}: has no get_model_path(); name a package that brings a model") from None
