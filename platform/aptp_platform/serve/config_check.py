"""Whether a Serve config file can be served: read as Ray reads it, except that no key is ignored."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from aptp_platform.serve.app import build
from aptp_platform.serve.args import ServeArgs
from aptp_platform.unknown_keys import unknown_key

_OURS: Final = "aptp_platform.serve.app:build"


def check_config(path: Path) -> list[str]:
    """The names of the file's applications, each of which could be deployed now.

    Raises:
        ValueError: one line: the key, what is wrong, the rule. Of our own application everything is checked that
            `build` checks, the release too.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: name a file that can be read") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a mapping with the key applications")
    _check_keys(data, ServeDeploySchema, "")
    config = _validated(ServeDeploySchema, data, "")
    for index, application in enumerate(config.applications):
        if application.import_path == _OURS:
            build(_validated(ServeArgs, application.args, f"applications.{index}.args."))
    return [application.name for application in config.applications]


def _check_keys(data: Any, model: type[BaseModel], place: str) -> None:
    """That every key below `place` is a field of Ray's schema, which would ignore it."""
    for key, value in data.items() if isinstance(data, dict) else ():
        if key not in model.model_fields:
            raise ValueError(unknown_key(f"{place}{key}", model.model_fields))
        inner = _model_in(model.model_fields[key].annotation)
        if inner is None:
            continue
        if isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(item, inner, f"{place}{key}.{index}.")
        else:
            _check_keys(value, inner, f"{place}{key}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The schema that a field holds, alone, in a list or as one of several; None: something else."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType):
        return next(filter(None, map(_model_in, get_args(annotation))), None)
    return None


def _validated(model: type[Any], data: Any, place: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}{where}: {first['msg'].removeprefix('Value error, ')}") from None
