"""What the server adds to Ray Serve: its ingress and router before an expert that does nothing, beside a bare chain."""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from aptp_platform.serve.args import ServeArgs
from aptp_platform.serve.http.ingress import Ingress
from aptp_platform.serve.messages import GenerationRequest, ImageResult
from aptp_platform.serve.release_source import ReleaseSource

# No postponed annotations in this file: FastAPI reads the type of `request`.
_OPTIONS: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 64}
_chain = FastAPI()


class NoopExpert:
    """An expert whose images are empty files."""

    async def generate(self, request: GenerationRequest, seed: int, release: str) -> ImageResult:
        return ImageResult(b"", seed, 1, 0.0, 0.0, 1)

    async def wake(self, release: str) -> None:
        return None


def server(args: ServeArgs) -> Application:
    """The server's own ingress and router before a no-op expert that stands for every code."""
    from aptp_platform.serve.routing.router import Router  # with torch, which the other replicas do without

    source = ReleaseSource(args.release)
    catalog = source.catalog(with_teacher=False)
    expert = serve.deployment(name="Noop", **_OPTIONS)(NoopExpert).bind()
    names = [model.name for model in catalog.models]
    router = serve.deployment(name="Router", **_OPTIONS)(Router).bind(
        source, catalog, args, dict.fromkeys(names, expert), dict.fromkeys(names, "Noop"), dict.fromkeys(names, 1)
    )
    return serve.deployment(name="Ingress", **_OPTIONS)(Ingress).bind(router, catalog, args)


class ChainExpert:
    """The end of the bare chain."""

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        return body


class ChainRouter:
    """Its middle."""

    def __init__(self, expert: "DeploymentHandle[Any]") -> None:
        self._expert = expert

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._expert.generate.remote(body)


@serve.ingress(_chain)
class ChainIngress:
    """Its HTTP end."""

    def __init__(self, router: "DeploymentHandle[Any]") -> None:
        self._router = router

    @_chain.post("/v1/images/generations")
    async def generate(self, request: Request) -> dict[str, Any]:
        return await self._router.generate.remote(await request.json())


def chain() -> Application:
    """Ray Serve's own three-deployment no-op chain."""
    expert = serve.deployment(name="ChainExpert", **_OPTIONS)(ChainExpert).bind()
    router = serve.deployment(name="ChainRouter", **_OPTIONS)(ChainRouter).bind(expert)
    return serve.deployment(name="ChainIngress", **_OPTIONS)(ChainIngress).bind(router)
