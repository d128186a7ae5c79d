"""The files outside a run that it starts from, as they are now: captioned images and models, by name, size and version.

A listing of images (`metadata.jsonl`, COCO, a table) stands for the files beside it too. Everything is listed before a
stage touches anything; what is missing or cannot be listed raises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aptp_platform.config import PACKAGE, DataConfig, ModelConfig, StorageConfig
from aptp_platform.storage.store import Store, fingerprint_of
from aptp_platform.storage.walk import FileInfo, matches

LISTINGS = (".jsonl", ".json", ".tsv")  # endings of files that name images beside them
_MODEL_ENDINGS = (".json", ".safetensors", ".txt", ".model")  # not the card or its pictures
_VAE = "vae/"
_UNUSED_PARTS = (_VAE, "safety_checker/", "feature_extractor/")


@dataclass(frozen=True)
class DataFiles:
    """One look at `data.source`: the files of both splits, and the images that listings among them name."""

    train: Mapping[str, FileInfo]
    heldout: Mapping[str, FileInfo]
    images: Mapping[str, FileInfo]


def images_folder(listing: str) -> str:
    """Where the images of a listing are, by its name: in its own folder; those of COCO's `annotations/captions_X.json`
    in `X/` beside `annotations/`."""
    folder, _, name = listing.rpartition("/")
    if not name.lower().endswith(".json"):
        return folder
    return f"{folder.rpartition('/')[0]}/{name[: -len('.json')].rpartition('_')[2]}".lstrip("/")


def data_files(config: DataConfig, storage: StorageConfig) -> DataFiles:
    """List the source, once unless a listing turns up unasked.

    Raises:
        StoreError: it cannot be listed, or no file is of one of the splits.
    """
    store = Store.open(config.source, storage)
    patterns = {"train": config.train, "heldout": config.heldout}
    deep = any(_is_listing(pattern) for pattern in patterns.values())
    found = store.files("**") if deep else store.files(*patterns.values())
    splits = {name: {n: f for n, f in found.items() if matches(n, each)} for name, each in patterns.items()}
    for split, pattern in patterns.items():
        if not splits[split]:
            store.require(pattern, f"data.source or data.{split}")
    given = {**splits["train"], **splits["heldout"]}
    folders = {images_folder(name) for name in given if _is_listing(name)}
    if folders and not deep:
        found = store.files("**")
    images = {
        name: info
        for name, info in found.items()
        if name not in given and any(not folder or name.startswith(f"{folder}/") for folder in folders)
    }
    return DataFiles(splits["train"], splits["heldout"], images)


def _is_listing(name: str) -> bool:
    return name.lower().endswith(LISTINGS)


def data_facts(files: DataFiles) -> dict[str, Any]:
    """What is kept of them in a stage's record."""
    groups = {"data.train": files.train, "data.heldout": files.heldout, "data.source (listed images)": files.images}
    return {name: _facts(group) for name, group in groups.items() if group}


def encoder_facts(config: ModelConfig, storage: StorageConfig) -> dict[str, Any]:
    """Of the models that encode: the pipeline's autoencoder and the prompt encoder."""
    whole = _model_files("model.pipeline", config.pipeline, storage)
    return {
        "model.pipeline (vae)": _part(whole, lambda name: name.startswith(_VAE)),
        "model.prompt_encoder": _part(_model_files("model.prompt_encoder", config.prompt_encoder, storage)),
    }


def network_facts(config: ModelConfig, storage: StorageConfig) -> dict[str, Any]:
    """Of the models that are trained with: the UNet, its scheduler and its text encoder."""
    unused = (*_UNUSED_PARTS, *(("text_encoder/", "tokenizer/") if config.text_encoder else ()))
    whole = _model_files("model.pipeline", config.pipeline, storage)
    facts = {"model.pipeline": _part(whole, lambda name: "/" in name and not name.startswith(unused))}
    if config.text_encoder:
        facts["model.text_encoder"] = _part(_model_files("model.text_encoder", config.text_encoder, storage))
    return facts


def folder_facts(field: str, place: str, storage: StorageConfig) -> dict[str, Any]:
    """Of a model in a folder of its own."""
    return {field: _part(_model_files(field, place, storage))}


def _model_files(field: str, spec: str, storage: StorageConfig) -> Mapping[str, FileInfo] | str:
    if spec.startswith(PACKAGE):
        return spec
    store = Store.open(spec, storage)
    files = {name: info for name, info in store.files("**").items() if name.endswith(_MODEL_ENDINGS)}
    if not files:
        store.require("**", field)
    return files


def _part(files: Mapping[str, FileInfo] | str, belongs: Callable[[str], bool] = lambda name: True) -> Any:
    return files if isinstance(files, str) else _facts({name: f for name, f in files.items() if belongs(name)})


def _facts(files: Mapping[str, FileInfo]) -> dict[str, Any]:
    return {
        "files": len(files),
        "bytes": sum(info.size for info in files.values()),
        "sha256": fingerprint_of(files),
    }
