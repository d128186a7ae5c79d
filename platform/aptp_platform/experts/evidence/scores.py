"""What the evaluation of one run measured, row by row, on disk: scores.safetensors, and scores.json for the rest.

Runs of other configs are compared from these files alone: no network runs again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int, UInt8
from safetensors.numpy import load_file, save_file

from aptp.codes import ArchitectureCode, PruningSpace
from aptp_platform.experts.evidence.arms import TEACHER, Arm, Network, arm_of, build_arms
from aptp_platform.run.layout import network_of

FORMAT: Final = 1
ARRAYS: Final = "scores.safetensors"
FACTS: Final = "scores.json"
FILES: Final = (ARRAYS, FACTS)


@dataclass(frozen=True)
class RunScores:
    """One run on its held-out rows, in their order.

    Attributes:
        seed: the run's. steps_shared: of the training that its experts share.
        codes: the router's, at the price at which the rows cost the budget. predicted: the losses that it predicts.
        networks: `teacher`, `00`, ..., and the baselines. device, batch_size, timesteps: of the scoring.
        features: of the images that an arm generated for the first rows. real: of as many held-out images as there are.
            texts: of those rows' captions, if the extractor reads texts. extractor: its name.
        image_scores: by arm. pictures: PNG files of the first rows, by arm.
    """

    budget: float
    seed: int
    steps_shared: int
    keys: list[str]
    captions: list[str]
    kinds: list[str]
    embeddings: Float[np.ndarray, "row dim"]
    codes: Int[np.ndarray, " row"]
    predicted: Float[np.ndarray, "row code"] | None
    networks: dict[str, Network]
    device: str
    batch_size: int
    timesteps: list[int]
    extractor: str
    features: dict[str, Float[np.ndarray, "drawn feature"]] = field(default_factory=dict)
    real: Float[np.ndarray, "real feature"] | None = None
    texts: Float[np.ndarray, "drawn feature"] | None = None
    image_scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    pictures: dict[str, list[bytes]] = field(default_factory=dict)
    architectures: Sequence[ArchitectureCode] = ()

    @property
    def teacher(self) -> Network:
        return self.networks[TEACHER]

    @property
    def experts(self) -> list[Network]:
        """One per code."""
        count = sum(name.isdigit() for name in self.networks)
        return [self.networks[network_of(code)] for code in range(count)]

    @property
    def singles(self) -> dict[str, Network]:
        """The networks that each answer for all prompts."""
        return {name: net for name, net in self.networks.items() if name != TEACHER and not name.isdigit()}

    def arms(self) -> dict[str, Arm]:
        """Every arm that one run has; see `arms`."""
        return build_arms(self.teacher, self.experts, self.codes, self.singles)

    def routed(self) -> Arm:
        return arm_of(self.experts, self.codes)

    @property
    def steps(self) -> int:
        """Training steps of all experts together, with those that they share."""
        return self.steps_shared + sum(expert.steps for expert in self.experts)

    def save(self, folder: Path) -> None:
        """Write both files into a folder that exists."""
        arrays: dict[str, np.ndarray] = {"codes": self.codes.astype(np.int64), "embeddings": self.embeddings}
        for name, network in self.networks.items():
            arrays |= {f"losses/{name}": network.losses, f"distances/{name}": network.distances}
        arrays |= {f"features/{name}": rows for name, rows in self.features.items()}
        optional = {"predicted": self.predicted, "real": self.real, "texts": self.texts}
        arrays |= {name: rows for name, rows in optional.items() if rows is not None}
        for name, pictures in self.pictures.items() if any(self.pictures.values()) else ():
            arrays |= {
                f"pictures/{name}": _joined(pictures),
                f"picture_sizes/{name}": np.array(list(map(len, pictures))),
            }
        save_file({name: np.ascontiguousarray(rows) for name, rows in arrays.items()}, folder / ARRAYS)
        facts = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _PLAIN},
            "networks": {
                name: {"cost": net.cost, "milliseconds": net.milliseconds, "steps": net.steps}
                for name, net in self.networks.items()
            },
            "space": self.architectures[0].space.to_json() if self.architectures else None,
            "architectures": [code.to_json() for code in self.architectures],
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


_PLAIN: Final = (
    "budget", "seed", "steps_shared", "keys", "captions", "kinds", "device", "batch_size", "timesteps", "extractor",
    "image_scores",
)  # fmt: skip


def load_scores(folder: Path) -> RunScores:
    """Read what `RunScores.save` wrote.

    Raises:
        ValueError: a file is missing, or another version wrote it.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}; run the evaluate job of that run again")
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{folder / FACTS}: format {facts.get('format')!r}: must be {FORMAT}; run its evaluate job again"
        )
    arrays = load_file(folder / ARRAYS)
    space = PruningSpace.from_json(facts["space"]) if facts["space"] else None
    return RunScores(
        **{name: facts[name] for name in _PLAIN},
        embeddings=arrays["embeddings"],
        codes=arrays["codes"],
        predicted=arrays.get("predicted"),
        networks={
            name: Network(arrays[f"losses/{name}"], arrays[f"distances/{name}"], **told)
            for name, told in facts["networks"].items()
        },
        features=_below("features/", arrays),
        real=arrays.get("real"),
        texts=arrays.get("texts"),
        pictures={
            name: _parts(rows, arrays[f"picture_sizes/{name}"]) for name, rows in _below("pictures/", arrays).items()
        },
        architectures=[ArchitectureCode.from_json(space, value) for value in facts["architectures"]] if space else [],
    )


def _below(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): rows for name, rows in arrays.items() if name.startswith(prefix)}


def _joined(pictures: Sequence[bytes]) -> UInt8[np.ndarray, " byte"]:
    return np.frombuffer(b"".join(pictures), dtype=np.uint8)


def _parts(joined: UInt8[np.ndarray, " byte"], sizes: Int[np.ndarray, " picture"]) -> list[bytes]:
    ends = np.cumsum(sizes)
    return [joined[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]
