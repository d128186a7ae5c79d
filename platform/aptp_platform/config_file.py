"""Read and print a run's config: YAML over the defaults, one line for what is wrong, the whole tree back as YAML."""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import yaml

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.storage.store import Store
from aptp_platform.unknown_keys import unknown_key

# Fields of a library's config that another field of the tree sets: not accepted from YAML, not printed.
SET_BY = {"prune.objective.budget": "router.budget"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.field=value` overrides (the value is YAML too).

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown (the nearest one is named), a value has the
            wrong type or breaks a rule.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"config: {path} does not exist; name one, such as jobs/configs/demo.yaml") from None
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read: {error.strerror}; name a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config: {path} is not YAML: {getattr(error, 'problem', None) or 'bad bytes'}{line}"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {path} holds {type(tree).__name__}; it must be a mapping of sections")
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override: {name!r} has no value; write section.field=value")
        node = tree
        *parents, leaf = name.split(".")
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"override: {name}: {parent} is a value, not a section")
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"override: {name}: its value is not YAML; quote it") from None
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from plain data over the defaults; raises `ConfigError` as `load_config` does."""
    for name, setter in SET_BY.items():
        *sections, leaf = name.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and leaf in node:
            raise ConfigError(f"{name}: unknown key; {setter} sets it")
    try:
        config = _adapter(RunConfig).validate_python(_merged(to_tree(RunConfig()), tree))
    except pydantic.ValidationError as error:
        raise ConfigError(_first_of(error)) from None
    _check(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole tree as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def to_tree(config: Any) -> Any:
    """A config or one section of it as plain data."""
    kind: Any = type(config)
    tree = _adapter(kind).dump_python(config, mode="json")
    for name in SET_BY if isinstance(config, RunConfig) else ():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        del node[leaf]
    return tree


def places(config: RunConfig) -> dict[str, str]:
    """The folders and buckets that a run works with, by the field that names them."""
    model = config.model
    named = {"root": config.root, "data.source": config.data.source, "model.pipeline": model.pipeline}
    named |= {"model.text_encoder": model.text_encoder or "", "model.prompt_encoder": model.prompt_encoder}
    named |= {f"reuse.{stage}": place or "" for stage, place in vars(config.reuse).items()}
    named |= {"evaluate.features": config.evaluate.features.partition(":")[2]}
    return {field: place for field, place in named.items() if place and not place.startswith("package:")}


def with_fields(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with some fields (`section.field`) set; raises `ConfigError` as `parse_config` does."""
    tree = to_tree(config)
    for field, value in values.items():
        *sections, leaf = field.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    return parse_config(tree)


def with_absolute_places(config: RunConfig) -> RunConfig:
    """For work in other processes than this one, whose folder relative paths name nothing in."""

    def absolute(field: str, place: str) -> str:
        value = config
        for name in field.split("."):
            value = getattr(value, name)
        return str(value).removesuffix(place) + Store.open(place).uri  # what stands before it says what it is

    return with_fields(config, {field: absolute(field, place) for field, place in places(config).items()})


@cache
def _adapter(kind: type) -> pydantic.TypeAdapter[Any]:
    """Cached, because building one takes much longer than using it."""
    return pydantic.TypeAdapter(kind)


def _merged(base: Any, change: Any) -> Any:
    """Plain data with the values of other plain data in their places; an empty section changes nothing."""
    if not isinstance(base, dict):
        return change
    if change is None:
        return base
    if not isinstance(change, dict):
        return change
    return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}


def _first_of(error: pydantic.ValidationError) -> str:
    """What pydantic found first, as one line: the field, the value, the rule."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        section: Any = RunConfig
        for name in first["loc"][:-1]:
            section = typing.get_type_hints(section)[str(name)]
        known = [each.name for each in dataclasses.fields(section)]
        prefix = where.rpartition(".")[0]
        return unknown_key(where, [name for name in known if f"{prefix}.{name}" not in SET_BY])
    rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if first["loc"][0] == "storage" or first["type"] == "value_error":  # it may be a secret; it is a whole section
        return f"{where}: {rule}"
    return f"{where}: {reprlib.repr(first['input'])}: {rule}"


def _check(config: RunConfig) -> None:
    """Rules that a type cannot say."""
    endpoint = config.storage.endpoint
    if endpoint is not None and ("@" in endpoint or not endpoint.startswith(("http://", "https://"))):
        raise ConfigError("storage.endpoint: must be http://host:port or https://host, with no user or password in it")
    for where, run in (("prune", config.prune.run), ("finetune", config.finetune.run)):
        if run.steps < 1:
            raise ConfigError(f"{where}.run.steps: {run.steps}: must be at least 1")
    for where, place in (("data.source", config.data.source), ("model.pipeline", config.model.pipeline)):
        if not place:
            raise ConfigError(f"{where}: '': must name a folder: a path, file:// or s3:// URI")
    for where, place in places(config).items():
        try:
            Store.open(place)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
