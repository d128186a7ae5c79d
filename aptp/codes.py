"""The narrow waist of the library: what may be pruned (`PruningSpace`) and what is (`ArchitectureCode`).

An architecture vector has one entry per removable unit: first the units of every width site, then one entry per depth
site. All that speaks of architectures (router, gates, cost, slicing, experts on disk) speaks in these two values.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

WidthKind = Literal["groups", "heads", "hidden"]
DepthKind = Literal["resnet", "transformer", "block"]
SiteKind = Literal["groups", "heads", "hidden", "resnet", "transformer", "block"]


@dataclass(frozen=True)
class Site:
    """One place of a network where units can be removed.

    A width site is named after the layer that consumes its channels (a mask multiplies that layer's input), a depth
    site after the layer that is bypassed; its `channels_per_unit` are the channels that pass when it is dropped.
    """

    name: str
    kind: SiteKind
    units: int
    channels_per_unit: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise ValueError(f"site {self.name!r}: kind {self.kind!r} is not one of {', '.join(get_args(SiteKind))}")
        if self.units < 1 or self.channels_per_unit < 1:
            raise ValueError(
                f"site {self.name!r}: units ({self.units}) and channels_per_unit ({self.channels_per_unit}) "
                "must both be at least 1"
            )

    @property
    def channels(self) -> int:
        """Channels of the whole site."""
        return self.units * self.channels_per_unit


@dataclass(frozen=True)
class PruningSpace:
    """All sites of one network, in the order of the architecture vector.

    `keep_order` ranks the depth sites from the one kept longest, which learning never drops, to the one dropped first;
    None leaves every depth entry free of the others.
    """

    width: tuple[Site, ...]
    depth: tuple[Site, ...]
    keep_order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for site in self.width:
            if site.kind not in get_args(WidthKind):
                raise ValueError(f"site {site.name!r} of kind {site.kind!r} is no width site: list it under depth")
        for site in self.depth:
            if site.kind not in get_args(DepthKind) or site.units != 1:
                raise ValueError(f"site {site.name!r} ({site.kind}, {site.units} units) is no depth site of one unit")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"site {twice!r} appears twice: every site of a space needs its own name")
        if self.keep_order is not None and sorted(self.keep_order) != list(range(len(self.depth))):
            raise ValueError(
                f"keep_order {self.keep_order} must name each of the {len(self.depth)} depth sites exactly once"
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        """Width sites, then depth sites: the order of the architecture vector."""
        return self.width + self.depth

    def __len__(self) -> int:
        """D, the length of an architecture vector."""
        return self.width_entries + len(self.depth)

    @cached_property
    def width_entries(self) -> int:
        """Number of entries that belong to width sites; they come first."""
        return sum(site.units for site in self.width)

    @cached_property
    def _slices(self) -> dict[str, slice]:
        slices, start = {}, 0
        for site in self.sites:
            slices[site.name] = slice(start, start + site.units)
            start += site.units
        return slices

    def slice_of(self, name: str) -> slice:
        """Where the entries of the site `name` lie in an architecture vector."""
        if name not in self._slices:
            raise ValueError(
                f"site {name!r} is not in this space of {len(self.sites)} sites: read the space of this model"
            )
        return self._slices[name]

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """For every width site, the index of the depth site that contains it, or -1."""
        return tuple(
            next((i for i, depth in enumerate(self.depth) if site.name.startswith(f"{depth.name}.")), -1)
            for site in self.width
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the space's canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The space as a JSON value."""
        return {
            "width": [asdict(site) for site in self.width],
            "depth": [asdict(site) for site in self.depth],
            "keep_order": None if self.keep_order is None else list(self.keep_order),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PruningSpace":
        """The inverse of `to_json`; ValueError when a field is missing, unknown or illegal."""
        if set(value) != {"width", "depth", "keep_order"}:
            raise ValueError(f"a space has the fields width, depth and keep_order; found {', '.join(sorted(value))}")
        try:
            width = tuple(Site(**site) for site in value["width"])
            depth = tuple(Site(**site) for site in value["depth"])
        except TypeError as error:
            raise ValueError(f"a site has the fields name, kind, units and channels_per_unit: {error}") from error
        order = value["keep_order"]
        return cls(width, depth, None if order is None else tuple(order))


@dataclass(frozen=True, eq=False)
class ArchitectureCode:
    """Which units of a space are kept. Legal by construction: a width site always keeps at least one unit.

    `bits` is True where the unit is kept. Raises ValueError naming the site that breaks the rule.
    """

    space: PruningSpace
    bits: Bool[Tensor, " gate"]

    def __post_init__(self) -> None:
        if tuple(self.bits.shape) != (len(self.space),) or self.bits.dtype != torch.bool:
            raise ValueError(
                f"bits of shape {tuple(self.bits.shape)} and type {self.bits.dtype}: "
                f"this space takes a bool vector of {len(self.space)} entries"
            )
        object.__setattr__(self, "bits", self.bits.detach().cpu().clone())
        for site in self.space.width:
            if not self.bits[self.space.slice_of(site.name)].any():
                raise ValueError(
                    f"site {site.name!r} keeps none of its {site.units} units: keep at least one "
                    "(removing a whole layer is the business of a depth site)"
                )

    @classmethod
    def full(cls, space: PruningSpace) -> "ArchitectureCode":
        """The code of the whole network."""
        return cls(space, torch.ones(len(space), dtype=torch.bool))

    @classmethod
    def smallest(cls, space: PruningSpace) -> "ArchitectureCode":
        """The smallest code that can be learned: the first unit of every width site, and of ordered depth sites the one
        that is kept longest."""
        bits = torch.zeros(len(space), dtype=torch.bool)
        bits[[space.slice_of(site.name).start for site in space.width]] = True
        if space.keep_order:
            bits[space.width_entries + space.keep_order[0]] = True
        return cls(space, bits)

    @property
    def mask(self) -> Float[Tensor, " gate"]:
        """The bits as a float32 vector of zeros and ones."""
        return self.bits.float()

    def kept_units(self, name: str) -> Int[Tensor, " unit"]:
        """Indices of the kept units of a site, ascending."""
        return self.bits[self.space.slice_of(name)].nonzero().flatten()

    def drops(self, name: str) -> bool:
        """Whether the depth site `name` is dropped."""
        return not bool(self.bits[self.space.slice_of(name)].any())

    def to_json(self) -> dict[str, Any]:
        """The code as a JSON value: the kept units of every width site and the names of the dropped depth sites."""
        return {
            "space": self.space.fingerprint,
            "keep": {site.name: self.kept_units(site.name).tolist() for site in self.space.width},
            "drop": [site.name for site in self.space.depth if self.drops(site.name)],
        }

    @classmethod
    def from_json(cls, space: PruningSpace, value: Mapping[str, Any]) -> "ArchitectureCode":
        """The inverse of `to_json`; ValueError when the value is of another space or breaks a rule."""
        if set(value) != {"space", "keep", "drop"}:
            raise ValueError(f"a code has the fields space, keep and drop; found {', '.join(sorted(value))}")
        if value["space"] != space.fingerprint:
            raise ValueError(
                f"this code belongs to the space {value['space'][:12]}, not to {space.fingerprint[:12]}: "
                "read it with the space it was made for"
            )
        bits = torch.zeros(len(space), dtype=torch.bool)
        bits[space.width_entries :] = True
        if set(value["keep"]) != {site.name for site in space.width}:
            raise ValueError("the field keep must list the kept units of every width site of the space")
        for site in space.width:
            kept = value["keep"][site.name]
            if not all(isinstance(unit, int) and 0 <= unit < site.units for unit in kept):
                raise ValueError(f"site {site.name!r} has units 0 to {site.units - 1}; found {kept}")
            bits[space.slice_of(site.name)][kept] = True
        for name in value["drop"]:
            if space.slice_of(name).start < space.width_entries:
                raise ValueError(f"site {name!r} is a width site: only depth sites can be dropped")
            bits[space.slice_of(name)] = False
        return cls(space, bits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ArchitectureCode):
            return NotImplemented
        return self.space == other.space and torch.equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return hash((self.space.fingerprint, tuple(self.bits.tolist())))
