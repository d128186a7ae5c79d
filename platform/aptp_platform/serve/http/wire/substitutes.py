"""What stands in for a model name or a size that is not served, as `images` of the config says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import log
from typing import Final

from aptp_platform.serve.args import SIZE, ImageArgs
from aptp_platform.serve.messages import AUTO, ApiError, Catalog

REFUSE: Final = "refuse"
_Size = tuple[int, int]


def check_names(limits: ImageArgs, catalog: Catalog) -> None:
    """That every alias means a model of the release.

    Raises:
        ValueError: it names the alias and lists the models.
    """
    served = _served(catalog)
    wanted = {f"images.aliases: {name!r}": model for name, model in limits.aliases.items()}
    if limits.other_models != REFUSE:
        wanted["images.other_models"] = limits.other_models
    for place, model in wanted.items():
        if model not in served:
            raise ValueError(f"{place}: {model!r} is no model of this release: name one of {', '.join(served)}")


def model_of(name: str, limits: ImageArgs, catalog: Catalog) -> str:
    """The served model that a name means: its own, an alias's, or that of the part behind a provider ("openai/auto").

    Raises:
        ApiError: 404.
    """
    served = _served(catalog)
    for candidate in (name, name.rpartition("/")[2]):
        if candidate in served:
            return candidate
        alias = next((model for pattern, model in limits.aliases.items() if fnmatchcase(candidate, pattern)), None)
        if alias is not None:
            return alias
    if limits.other_models != REFUSE:
        return limits.other_models
    message = f"The model {name[:64]!r} does not exist. Known: {', '.join([*served, *limits.aliases])}."
    raise ApiError(404, message, code="model_not_found", param="model")


@dataclass(frozen=True)
class DrawnSize:
    """(width, height) that is drawn; of the file, if it is made larger or smaller afterwards; that was asked for."""

    drawn: _Size
    resized: _Size | None
    asked: _Size

    @property
    def told(self) -> str:
        """For a response header: "512x512", or what became of another wish."""
        told = _text(self.drawn)
        if self.resized is not None:
            told += f", resized to {_text(self.resized)}"
        return told if self.asked in (self.drawn, self.resized) else f"{told}, nearest to {_text(self.asked)}"


def size_of(text: str, limits: ImageArgs, native: _Size) -> DrawnSize:
    """What is drawn for "auto" or "WxH".

    Raises:
        ApiError: 400 for what is no size, or not served where the config refuses those.
    """
    served = dict.fromkeys([_text(native), *limits.sizes])
    if text == "auto":
        return DrawnSize(native, None, native)
    match = SIZE.fullmatch(text)
    if match is None or (text not in served and limits.other_sizes == REFUSE):
        message = f"Invalid 'size': {text[:32]!r} is not served. Served: {', '.join(['auto', *served])}."
        raise ApiError(400, message, code="invalid_value", param="size")
    asked = int(match[1]), int(match[2])
    if text in served:
        return DrawnSize(asked, None, asked)
    drawn = _nearest(asked, (_pair(each) for each in served))
    if limits.other_sizes == "nearest":
        return DrawnSize(drawn, None, asked)
    if max(asked) > limits.max_resize:
        message = f"Invalid 'size': {text!r}: a side must be at most {limits.max_resize} pixels."
        raise ApiError(400, message, code="invalid_value", param="size")
    return DrawnSize(drawn, asked, asked)


def _nearest(asked: _Size, sizes: Iterable[_Size]) -> _Size:
    """The size of nearest shape, then of nearest area, both as ratios; of equals the first."""

    def distance(size: _Size) -> tuple[float, float]:
        shape = abs(log(size[0] / size[1]) - log(asked[0] / asked[1]))
        return round(shape, 6), abs(log(size[0] * size[1]) - log(asked[0] * asked[1]))

    return min(sizes, key=distance)


def _served(catalog: Catalog) -> list[str]:
    return [AUTO, *(model.name for model in catalog.models)]


def _pair(text: str) -> _Size:
    width, _, height = text.partition("x")
    return int(width), int(height)


def _text(size: _Size) -> str:
    return f"{size[0]}x{size[1]}"
