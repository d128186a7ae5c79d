"""The prompt router: z -> architecture embedding -> the nearest of K architecture codes.

    e = predictor(z);   C_bk = <phi(y(e_b)), phi(y(A_k))>;   code of prompt b = argmax_k C_bk + bias_k

with y the gates of `aptp.relax` and phi(y) the soft gates, a width gate times the depth gate above it, every site
scaled to unit norm when full, normalised to length one (APTP, section 3). Inference has no noise: a route is a function
of the prompt and the weights, whatever the batch, its order or the seed. `bias` and `shift` are zero (the paper's rule)
until `aptp.calibration.calibrate_budget` sets them, one to share prompts out as training did, one to meet the budget.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aptp.codes import ArchitectureCode, PruningSpace
from aptp.prompts import PromptEncoder
from aptp.relax import Relaxation, harden, soft_gates

_SCHEMA: Final = 1
_WEIGHTS, _CONFIG, _ENCODER = "router.safetensors", "router.json", "encoder"


class UnusedCodeError(ValueError):
    """A code to which no prompt is routed: it would become an expert without training data."""


@dataclass(frozen=True)
class RouterConfig:
    """num_codes K, embedding_dim of the prompt encoder, and how logits start.

    initial_logit, initial_spread: logits of codes and predictor start at N(initial_logit, initial_spread^2). The paper
        starts at 0 with orthonormal rows (spread about 1/sqrt(D)), where a gate's slope is 0.0014 and all codes are
        equal to rounding: paper() gives that. Starting nearer the threshold, -offset = -3, lets a short run learn.
    initial_depth: the start of the logit that stands for "keep all depth" in an ordered space. At the paper's 0 the
        gates that go first start three quarters open, and a few steps of the budget's pressure close them.
    normalise: the predictor sees z centred and divided by its 1-norm, so that one step of Adam moves its logits at most
        as far as it moves a code's, and one learning rate serves both. The paper feeds z as it is.
    features: "soft", or the paper's "mixed" (hard bits, but soft products under a depth gate).
    """

    num_codes: int = 16
    embedding_dim: int = 768
    relaxation: Relaxation = field(default_factory=Relaxation)
    initial_logit: float = -2.0
    initial_spread: float = 0.2
    initial_depth: float = 2.0
    normalise: bool = True
    features: Literal["soft", "mixed"] = "soft"

    def __post_init__(self) -> None:
        for name in ("num_codes", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.initial_spread <= 0:
            raise ValueError(f"initial_spread must be positive (equal codes cannot part), it is {self.initial_spread}")
        if self.features not in ("soft", "mixed"):
            raise ValueError(f"features must be 'soft' or 'mixed', it is {self.features!r}")

    @classmethod
    def paper(cls, num_codes: int = 16, embedding_dim: int = 768) -> "RouterConfig":
        """The published router's own start and features."""
        return cls(
            num_codes,
            embedding_dim,
            initial_logit=0.0,
            initial_spread=0.025,
            initial_depth=0.0,
            normalise=False,
            features="mixed",
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RouterConfig":
        return cls(**{**data, "relaxation": Relaxation(**data["relaxation"])})


@dataclass(frozen=True)
class Routes:
    """indices: each prompt's code. similarities: to every code, with bias. margins: best minus second (0 for K=1)."""

    indices: Int[Tensor, " batch"]
    similarities: Float[Tensor, "batch code"]
    margins: Float[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.indices)

    def usage(self) -> Float[Tensor, " code"]:
        """Each code's share of these prompts."""
        return code_usage(self.indices, self.similarities.shape[1])


def code_usage(indices: Int[Tensor, " batch"], num_codes: int) -> Float[Tensor, " code"]:
    """Each code's share of the prompts."""
    codes = torch.arange(num_codes, device=indices.device)
    return (indices[:, None] == codes).float().sum(0) / max(len(indices), 1)


def require_used(usage: Float[Tensor, " code"]) -> None:
    """UnusedCodeError, naming them, if there are codes without a prompt."""
    unused = [index for index, share in enumerate(usage.tolist()) if share == 0]
    if unused:
        raise UnusedCodeError(
            f"no prompt is routed to code {', '.join(map(str, unused))} of {len(usage)} "
            f"(usage {[round(share, 3) for share in usage.tolist()]}): "
            "calibrate with balance=True, raise the pull weight, train longer, or lower num_codes"
        )


class ArchitecturePredictor(nn.Module):
    """e = W x + c, one linear map from the embedding to the logits of a whole architecture.

    x is z, or with `normalise` (z - centre) / |z - centre|_1.
    """

    centre: Tensor

    def __init__(self, embedding_dim: int, num_gates: int, *, normalise: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, num_gates)
        self.normalise = normalise
        self.register_buffer("centre", torch.zeros(embedding_dim))

    def forward(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch gate"]:
        x = embeddings.float()
        if self.normalise:
            x = F.normalize(x - self.centre, p=1, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x)


class Router(nn.Module):
    """Predictor, codes and what turns them into routes; the prompt encoder is optional (training has embeddings)."""

    site_index: Tensor
    owner_index: Tensor
    keep_order: Tensor | None
    site_scale: Tensor
    bias: Tensor
    shift: Tensor

    def __init__(
        self,
        space: PruningSpace,
        config: RouterConfig,
        encoder: PromptEncoder | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None and encoder.dim != config.embedding_dim:
            raise ValueError(f"embedding_dim is {config.embedding_dim}, but the prompt encoder gives {encoder.dim}-d")
        self.space, self.config, self.encoder = space, config, encoder
        self.predictor = ArchitecturePredictor(config.embedding_dim, len(space), normalise=config.normalise)
        self.codes = nn.Parameter(torch.empty(config.num_codes, len(space)))
        self._lay_out()
        self._start(generator)

    def _lay_out(self) -> None:
        space = self.space
        units = torch.tensor([site.units for site in space.width], dtype=torch.long)
        order = None if space.keep_order is None else torch.tensor(space.keep_order, dtype=torch.long)
        # A width site without a depth site above it points one past the last depth gate, where `features` puts a one.
        owners = torch.tensor([len(space.depth) if owner < 0 else owner for owner in space.owners], dtype=torch.long)
        scale = torch.cat([units.repeat_interleave(units), torch.ones(len(space.depth))]).float().rsqrt()
        self.register_buffer("site_index", torch.arange(len(units)).repeat_interleave(units), persistent=False)
        self.register_buffer("owner_index", owners.repeat_interleave(units), persistent=False)
        self.register_buffer("keep_order", order, persistent=False)
        self.register_buffer("site_scale", scale, persistent=False)
        self.register_buffer("bias", torch.zeros(self.config.num_codes))
        self.register_buffer("shift", torch.zeros(2))

    @torch.no_grad()
    def _start(self, generator: torch.Generator | None) -> None:
        config, width = self.config, self.space.width_entries
        weight, dim = self.predictor.linear.weight, self.config.embedding_dim
        # |x|_2 of an embedding with 1-norm one is about 1.25 / sqrt(dim); the paper's W has orthonormal blocks.
        spread = config.initial_spread * dim**0.5 / 1.25 if config.normalise else dim**-0.5
        weight.normal_(0, spread, generator=generator)
        self.codes.normal_(0, config.initial_spread, generator=generator)
        start = torch.zeros(len(self.space))
        start[:width] = config.initial_logit
        if self.keep_order is None:
            start[width:] = config.initial_logit
        else:
            start[width : width + 1] = config.initial_depth
        self.codes.add_(start)
        self.predictor.linear.bias.copy_(start)

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @torch.no_grad()
    def centre_embeddings(self, embeddings: Float[Tensor, "batch dim"]) -> None:
        """Sets the predictor's centre to the mean of (a sample of) the training embeddings, once, before training."""
        self.predictor.centre.copy_(embeddings.float().mean(0))

    def gates(
        self, logits: Float[Tensor, "batch gate"], noise: Float[Tensor, "batch gate"] | None = None
    ) -> Float[Tensor, "batch gate"]:
        """Soft gates of logits, of the predictor or of the codes. `shift` moves the width and the depth thresholds."""
        width = self.space.width_entries
        shift = torch.cat([self.shift[:1].expand(width), self.shift[1:].expand(len(self.space.depth))]).expand_as(
            logits
        )
        noise = shift if noise is None else torch.add(noise, shift)
        return soft_gates(logits, noise, width, self.keep_order, self.config.relaxation)

    def harden(self, soft: Float[Tensor, "batch gate"]) -> Float[Tensor, "batch gate"]:
        """Legal bits of soft gates, straight through."""
        return harden(soft, self.site_index)

    def features(self, soft: Float[Tensor, "batch gate"]) -> Float[Tensor, "batch gate"]:
        """phi: unit vectors whose dot products are the similarities."""
        entries = self.space.width_entries
        width, depth = soft[:, :entries], soft[:, entries:]
        width = width * F.pad(depth, (0, 1), value=1.0).index_select(1, self.owner_index)
        if self.config.features == "mixed":
            hard = self.harden(soft)
            width = torch.where(self.owner_index < len(self.space.depth), width, hard[:, :entries])
            depth = hard[:, entries:]
        return F.normalize(torch.cat([width, depth], dim=1) * self.site_scale, dim=1)

    def forward(
        self, embeddings: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch gate"], Float[Tensor, "code gate"]]:
        """Logits of the prompts' own architectures and of the codes: all that training needs of the parameters.

        They leave through a module's forward, and the codes as a copy, so that parameters that ZeRO 3 parts are whole.
        """
        return self.predictor(embeddings), self.codes.clone()

    def route_embeddings(self, embeddings: Float[Tensor, "batch dim"]) -> Routes:
        """Routes of prompts given their embeddings: noise-free, each row for itself."""
        return self.route_logits(*self(embeddings))

    @torch.no_grad()
    def route_logits(self, logits: Float[Tensor, "batch gate"], codes: Float[Tensor, "code gate"]) -> Routes:
        """Routes given what `forward` returns."""
        phi = self.features(self.gates(torch.cat([logits, codes])))  # at once: for one prompt each call is its overhead
        similarities = phi[: len(logits)] @ phi[len(logits) :].T + self.bias
        if self.num_codes == 1:
            return Routes(similarities.argmax(1), similarities, torch.zeros_like(similarities[:, 0]))
        best = similarities.topk(2, dim=1).values
        return Routes(similarities.argmax(1), similarities, best[:, 0] - best[:, 1])

    def familiarity(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """Cosine of each embedding to the predictor's centre, the mean training embedding; 0 if none was set.

        Similarities to the codes cannot tell a prompt of another kind, since codes are near one another and whatever is
        embedded is near them; this can.
        """
        return F.cosine_similarity(embeddings.float(), self.predictor.centre[None])

    def route(self, prompts: Sequence[str]) -> Routes:
        """Routes of prompts."""
        if self.encoder is None:
            raise ValueError("this router has no prompt encoder: give it one, or call route_embeddings")
        return self.route_embeddings(self.encoder.encode(prompts).to(self.bias.device))

    @torch.no_grad()
    def architecture_codes(self) -> list[ArchitectureCode]:
        """The K codes as bits, a function of the logits alone: what is cut, published and counted."""
        bits = self.harden(self.gates(self.codes)).bool().cpu()
        return [ArchitectureCode(self.space, row) for row in bits]

    @torch.no_grad()
    def keeping(self, codes: Sequence[int]) -> "Router":
        """This router with only these of its codes, in this order: a prompt of another goes to the nearest of them."""
        kept = Router(self.space, replace(self.config, num_codes=len(codes)), self.encoder)
        rows = {"codes": self.codes[list(codes)], "bias": self.bias[list(codes)]}
        kept.load_state_dict({**self.state_dict(), **rows})
        return kept.to(self.bias.device).eval()

    def save(self, path: Path | str) -> None:
        """A folder: router.safetensors, router.json, and encoder/ when there is one."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if not k.startswith("encoder.")
        }
        save_file(weights, folder / _WEIGHTS)
        data: dict[str, Any] = {"schema": _SCHEMA, "config": asdict(self.config), "space": self.space.to_json()}
        if self.encoder is not None:
            self.encoder.save(folder / _ENCODER)
            data["max_tokens"] = self.encoder.max_tokens
        (folder / _CONFIG).write_text(json.dumps(data, indent=1))

    @classmethod
    def load(cls, path: Path | str) -> "Router":
        """The router of a folder, strictly: same schema, same tensors."""
        folder = Path(path)
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"{folder} holds no {_CONFIG}: a router is a folder that Router.save wrote")
        data = json.loads((folder / _CONFIG).read_text())
        if data["schema"] != _SCHEMA:
            raise ValueError(f"{folder / _CONFIG} has schema {data['schema']}, this version reads schema {_SCHEMA}")
        encoder = None
        if (folder / _ENCODER).is_dir():
            encoder = PromptEncoder.load(folder / _ENCODER, max_tokens=data["max_tokens"])
        router = cls(PruningSpace.from_json(data["space"]), RouterConfig.from_json(data["config"]), encoder)
        weights = load_file(folder / _WEIGHTS)
        expected = {name for name in router.state_dict() if not name.startswith("encoder.")}
        if set(weights) != expected:
            raise ValueError(f"{folder / _WEIGHTS} holds {sorted(weights)}, a router has {sorted(expected)}")
        router.load_state_dict(weights, strict=False)
        return router.eval()
