"""What a sweep searches: config fields, each with the values it may take. Checked against the config before a trial."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from itertools import product
from typing import Any, Final

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import to_tree, with_fields

NUM_CODES: Final = "router.num_codes"
BUDGET: Final = "router.budget"
SECTIONS: Final = ("router", "space", "prune", "share", "assign")  # what a trial runs
_OWN_LISTS: Final = {NUM_CODES: "tune.num_codes", BUDGET: "tune.budgets"}

Settings = dict[str, Any]  # config fields to plain data


@dataclass(frozen=True)
class Values:
    """A field that takes one of these."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`. log: its logarithm is drawn evenly. whole: an integer."""

    low: float
    high: float
    log: bool
    whole: bool


Space = dict[str, Values | Range]


def read_space(config: RunConfig) -> Space:
    """The fields of `tune.num_codes`, `tune.budgets` and `tune.search`.

    Raises:
        ConfigError: a field is unknown, is none that a trial depends on, or a value is none that the field may have.
    """
    tune = config.tune
    space: Space = {
        NUM_CODES: _values(config, NUM_CODES, "tune.num_codes", tune.num_codes),
        BUDGET: _values(config, BUDGET, "tune.budgets", tune.budgets),
    }
    for field, given in tune.search.items():
        where = f"tune.search.{field}"
        if field in _OWN_LISTS:
            raise ConfigError(f"{where}: this field has a list of its own: set {_OWN_LISTS[field]}")
        if field.partition(".")[0] not in SECTIONS:
            raise ConfigError(f"{where}: a trial does not depend on it; name a field of {', '.join(SECTIONS)}")
        _require_field(config, field, where)
        if isinstance(given, list | tuple):
            space[field] = _values(config, field, where, given)
        elif isinstance(given, dict):
            space[field] = _range(config, field, where, given)
        else:
            raise ConfigError(f"{where}: {given!r}: write a list of values, or {{low: , high: , log: }}")
    return space


def points(space: Space) -> list[Settings] | None:
    """Every point; None if there is a range, so that they cannot be counted."""
    sides = [side.values for side in space.values() if isinstance(side, Values)]
    if len(sides) < len(space):
        return None
    return [dict(zip(space, point, strict=True)) for point in product(*sides)]


def holds(space: Space, settings: Mapping[str, Any]) -> bool:
    """Whether a point is in the space."""
    if set(settings) != set(space):
        return False
    return all(
        settings[field] in side.values if isinstance(side, Values) else side.low <= settings[field] <= side.high
        for field, side in space.items()
    )


def trial_name(settings: Mapping[str, Any]) -> str:
    """A folder's name: the number of codes, the budget, and a hash of the other fields if there are any."""
    name = f"codes-{settings[NUM_CODES]}-budget-{settings[BUDGET]:g}"
    others = {field: value for field, value in settings.items() if field not in _OWN_LISTS}
    if not others:
        return name
    return f"{name}-{hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6]}"


def _values(config: RunConfig, field: str, where: str, given: Any) -> Values:
    found = [_checked(config, field, where, value) for value in given]
    if not found:
        raise ConfigError(f"{where}: holds no value: name at least one")
    return Values(tuple(value for place, value in enumerate(found) if value not in found[:place]))


def _range(config: RunConfig, field: str, where: str, given: dict[str, Any]) -> Range:
    if not {"low", "high"} <= set(given) <= {"low", "high", "log"}:
        raise ConfigError(f"{where}: {given!r}: a range has low, high and, if it is logarithmic, log: true")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log: {log!r}: must be true or false")
    low, high = (_checked(config, field, f"{where}.{end}", given[end]) for end in ("low", "high"))
    for end, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}.{end}: {value!r}: only a number has a range; write a list of values")
    if not low < high:
        raise ConfigError(f"{where}: low {low:g} must be below high {high:g}")
    if log and low <= 0:
        raise ConfigError(f"{where}.low: {low:g}: a logarithmic range starts above 0")
    return Range(low, high, log, whole=isinstance(low, int))


def _require_field(config: RunConfig, field: str, where: str) -> None:
    """ConfigError if the config has no such field, or if it is a section."""
    node: Any = config
    *sections, leaf = field.split(".")
    for place, section in enumerate(sections):
        node = getattr(node, section, None)
        if node is None or not is_dataclass(node):
            _checked(config, ".".join(sections[: place + 1]), where, {})  # says which key is unknown
            raise ConfigError(f"{where}: {'.'.join(sections[: place + 1])} is no section of the config")
    if is_dataclass(getattr(node, leaf, None)):
        raise ConfigError(f"{where}: is a section; name one of its fields")


def _checked(config: RunConfig, field: str, where: str, value: Any) -> Any:
    """The value as the config holds it, as plain data."""
    try:
        node = to_tree(with_fields(config, {field: value}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for part in field.split("."):
        node = node[part]
    return node
