"""The prompt router: each prompt goes to one of K architecture codes, by what it needs or by what it resembles.

    need        code of prompt b = argmin_k d_k(z_b) + price cost_k - w C_bk - bias_k
    similarity  code of prompt b = argmax_k C_bk + bias_k                                    (APTP, section 3)

d is the loss that a code is expected to add (`aptp.need`), cost a code's MACs ratio, and price what one unit of it may
cost in loss: 0 asks for the best code, infinity for the cheapest. C_bk = <phi(y(e_b)), phi(y(A_k))> with e =
predictor(z), y the gates of `aptp.relax` and phi(y) the soft gates, a width gate times the depth gate above it, every
site scaled to unit norm when full, normalised to length one.

Inference has no noise: a route is a function of the prompt and the weights, whatever the batch, its order or the seed.
`price`, `costs`, `bias` and `shift` are zero until training and `aptp.calibration` set them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aptp.codes import ArchitectureCode, PruningSpace
from aptp.need import NeedHead
from aptp.prompts import PromptEncoder
from aptp.relax import harden, soft_gates
from aptp.routes import RouterConfig, Routes

_SCHEMA: Final = 3
# What routers of the schemas that can be read do not have yet: those of schema 1 have no need head.
_NEWER: Final = {1: {"offsets", "widening", "costs", "price"}, 2: {"widening"}, _SCHEMA: set[str]()}
_WEIGHTS, _CONFIG, _ENCODER = "router.safetensors", "router.json", "encoder"


class ArchitecturePredictor(nn.Module):
    """e = W x + c, one linear map from the embedding to the logits of a whole architecture, in fp32.

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
            x = F.normalize(x - self.centre.float(), p=1, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.linear.weight.float(), self.linear.bias.float())


class Router(nn.Module):
    """Predictor, codes, need head and what turns them into routes; the prompt encoder is optional (training has
    embeddings)."""

    site_index: Tensor
    owner_index: Tensor
    keep_order: Tensor | None
    site_scale: Tensor
    bias: Tensor
    shift: Tensor
    offsets: Tensor
    widening: Tensor
    costs: Tensor
    price: Tensor

    def __init__(
        self,
        space: PruningSpace,
        config: RouterConfig,
        encoder: PromptEncoder | None = None,
        *,
        need: NeedHead | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None and encoder.dim != config.embedding_dim:
            raise ValueError(f"embedding_dim is {config.embedding_dim}, but the prompt encoder gives {encoder.dim}-d")
        self.space, self.config, self.encoder = space, config, encoder
        self.predictor = ArchitecturePredictor(config.embedding_dim, len(space), normalise=config.normalise)
        self.codes = nn.Parameter(torch.empty(config.num_codes, len(space)))
        self.need = need
        if config.routing == "need" and need is None:
            self.need = NeedHead(config.num_codes, config.embedding_dim, config.need)
        self._lay_out()
        self._start(generator)

    def _lay_out(self) -> None:
        space, num_codes = self.space, self.config.num_codes
        units = torch.tensor([site.units for site in space.width], dtype=torch.long)
        order = None if space.keep_order is None else torch.tensor(space.keep_order, dtype=torch.long)
        # A width site without a depth site above it points one past the last depth gate, where `features` puts a one.
        owners = torch.tensor([len(space.depth) if owner < 0 else owner for owner in space.owners], dtype=torch.long)
        scale = torch.cat([units.repeat_interleave(units), torch.ones(len(space.depth))]).float().rsqrt()
        self.register_buffer("site_index", torch.arange(len(units)).repeat_interleave(units), persistent=False)
        self.register_buffer("owner_index", owners.repeat_interleave(units), persistent=False)
        self.register_buffer("keep_order", order, persistent=False)
        self.register_buffer("site_scale", scale, persistent=False)
        self.register_buffer("bias", torch.zeros(num_codes))
        self.register_buffer("shift", torch.zeros(2))
        self.register_buffer("offsets", torch.zeros(num_codes))
        self.register_buffer("widening", torch.zeros(num_codes))
        self.register_buffer("costs", torch.zeros(num_codes))
        self.register_buffer("price", torch.zeros(()))

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
        """Sets the predictor's centre to the mean of (a sample of) the training embeddings, once, before training.

        Raises:
            ValueError: there is none, or one is not finite: a NaN here would be every prompt's.
        """
        finite = torch.isfinite(embeddings).all(1)
        if not len(embeddings) or not finite.all():
            raise ValueError(
                f"the centre needs finite embeddings, at least one; of {len(embeddings)} {int((~finite).sum())} are not"
            )
        self.predictor.centre.copy_(embeddings.float().mean(0))

    def gates(
        self, logits: Float[Tensor, "batch gate"], noise: Float[Tensor, "batch gate"] | None = None
    ) -> Float[Tensor, "batch gate"]:
        """Soft gates of prompts' own logits. `shift` moves the width and the depth thresholds."""
        return self._gates(logits, self.shift[0].expand(len(logits)), noise)

    def code_gates(
        self, codes: Float[Tensor, "code gate"], noise: Float[Tensor, "code gate"] | None = None
    ) -> Float[Tensor, "code gate"]:
        """Soft gates of the K codes' logits: as `gates`, each code's width thresholds moved by its offset besides.

        Without noise they are moved by its `widening` too: what noise leaves open on average is larger than what the
        threshold leaves open, the more so the smaller the code, and a code is cut at the size that it was trained at.
        """
        offsets = self.offsets if noise is not None else self.offsets + self.widening
        return self._gates(codes, self.shift[0] + offsets, noise)

    def _gates(self, logits: Tensor, width_shift: Float[Tensor, " row"], noise: Tensor | None) -> Tensor:
        width = self.space.width_entries
        depth_shift = self.shift[1].expand(len(logits), len(self.space.depth))
        shift = torch.cat([width_shift[:, None].expand(-1, width), depth_shift], dim=1).float()
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

    def route_embeddings(
        self, embeddings: Float[Tensor, "batch dim"], *, price: float | Tensor | None = None
    ) -> Routes:
        """Routes of prompts given their embeddings: noise-free, each row for itself.

        price: in place of the router's own, 0 for the best codes and infinity for the cheapest. It needs the need rule.

        Raises:
            ValueError: an embedding has another width, or is not finite.
        """
        if embeddings.shape[1] != self.config.embedding_dim:
            raise ValueError(
                f"embeddings are {embeddings.shape[1]}-d, this router was made for {self.config.embedding_dim}-d ones: "
                "use the prompt encoder that it was trained with"
            )
        finite = torch.isfinite(embeddings).all(1)
        if not finite.all():
            raise ValueError(
                f"embedding {int(finite.int().argmin())} of {len(embeddings)} is not finite: the prompt encoder or its "
                "weights are damaged"
            )
        logits, codes = self(embeddings)
        losses = None if self.need is None else self.need(embeddings)
        return self.route_logits(logits, codes, losses, price=price)

    @torch.no_grad()
    def route_logits(
        self,
        logits: Float[Tensor, "batch gate"],
        codes: Float[Tensor, "code gate"],
        losses: Float[Tensor, "batch code"] | None,
        *,
        price: float | Tensor | None = None,
    ) -> Routes:
        """Routes given what `forward` and the need head return."""
        phi_prompts, phi_codes = self.features(self.gates(logits)), self.features(self.code_gates(codes))
        similarities = phi_prompts @ phi_codes.T
        scores = self.scores(similarities, losses, price)
        best = scores.topk(min(2, self.num_codes), dim=1).values
        return Routes(scores.argmax(1), scores, best[:, 0] - best[:, -1], similarities, losses)

    def scores(
        self,
        similarities: Float[Tensor, "batch code"],
        losses: Float[Tensor, "batch code"] | None,
        price: float | Tensor | None = None,
    ) -> Float[Tensor, "batch code"]:
        """What a prompt's code has most of, by the module's formula."""
        if losses is None:
            if price is not None:
                raise ValueError("this router routes by similarity: it predicts no losses to weigh a price against")
            return similarities + self.bias
        price = self.price if price is None else torch.as_tensor(price).to(losses)
        if not price >= 0:
            raise ValueError(f"price must not be negative, it is {float(price)}")
        if torch.isinf(price):  # the cheapest code, whatever is lost
            return (-self.costs).expand_as(losses)
        return self.config.similarity_weight * similarities - losses - price * self.costs + self.bias

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
        bits = self.harden(self.code_gates(self.codes)).bool().cpu()
        return [ArchitectureCode(self.space, row) for row in bits]

    @torch.no_grad()
    def keeping(self, codes: Sequence[int]) -> "Router":
        """This router with only these of its codes, in this order: a prompt of another goes to its best of them.

        Raises:
            ValueError: no code, one that does not exist, or one twice.
        """
        wrong = [code for code in codes if not 0 <= code < self.num_codes]
        if not codes or wrong or len(set(codes)) < len(codes):
            raise ValueError(f"keep different codes, at least one, of 0..{self.num_codes - 1}; not {list(codes)}")
        need = None if self.need is None else self.need.keeping(codes)
        kept = Router(self.space, replace(self.config, num_codes=len(codes)), self.encoder, need=need)
        rows = {name: getattr(self, name)[list(codes)] for name in ("codes", "bias", "offsets", "widening", "costs")}
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("need.")}
        kept.load_state_dict({**kept.state_dict(), **own, **rows})
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
        if self.need is not None:
            data["num_anchors"] = len(self.need.anchors)
        if self.encoder is not None:
            self.encoder.save(folder / _ENCODER)
            data["max_tokens"] = self.encoder.max_tokens
        (folder / _CONFIG).write_text(json.dumps(data, indent=1))

    @classmethod
    def load(cls, path: Path | str) -> "Router":
        """The router of a folder, strictly: same schema, same tensors. One without a need head routes by similarity."""
        folder = Path(path)
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"{folder} holds no {_CONFIG}: a router is a folder that Router.save wrote")
        data = json.loads((folder / _CONFIG).read_text())
        if data["schema"] not in _NEWER:
            raise ValueError(
                f"{folder / _CONFIG} has schema {data['schema']}, this version reads schemas "
                f"{', '.join(map(str, _NEWER))}"
            )
        encoder = None
        if (folder / _ENCODER).is_dir():
            encoder = PromptEncoder.load(folder / _ENCODER, max_tokens=data["max_tokens"])
        config, need = RouterConfig.from_json(data["config"]), None
        if config.routing == "need":
            need = NeedHead(config.num_codes, config.embedding_dim, config.need, num_anchors=data["num_anchors"])
        router = cls(PruningSpace.from_json(data["space"]), config, encoder, need=need)
        weights = load_file(folder / _WEIGHTS)
        expected = {name for name in router.state_dict() if not name.startswith("encoder.")}
        expected -= _NEWER[data["schema"]]
        if set(weights) != expected:
            raise ValueError(f"{folder / _WEIGHTS} holds {sorted(weights)}, a router has {sorted(expected)}")
        router.load_state_dict(weights, strict=False)
        return router.eval()
