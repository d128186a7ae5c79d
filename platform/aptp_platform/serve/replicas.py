"""How many replicas each model has now, as Serve's controller says, asked every few seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client

_LOG = logging.getLogger("ray.serve")


class ReplicaCounts:
    """`counts` by model; empty before the first answer, and kept while the controller does not answer.

    Args:
        deployments: the deployment of each model.
    """

    def __init__(self, deployments: Mapping[str, str], every_s: float) -> None:
        self._deployments, self._every_s = deployments, every_s
        self._app = serve.get_replica_context().app_name
        self._task: asyncio.Task[None] | None = None
        self.counts: dict[str, int] = {}

    def follow(self) -> None:
        """Starts to ask, on the running event loop; nothing if it does already."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        while True:
            try:
                self.counts = await asyncio.to_thread(self._count)
            except Exception:
                _LOG.warning("the replicas could not be counted; the last counts stay", exc_info=True)
            await asyncio.sleep(self._every_s)

    def _count(self) -> dict[str, int]:
        # `serve.status()` says the same, but builds every deployment's config anew for it; meanwhile nobody is served.
        client = _get_global_client()
        assert client is not None  # a replica runs, so the controller does
        deployments = client.get_serve_details()["applications"][self._app]["deployments"]
        return {
            model: sum(replica["state"] == ReplicaState.RUNNING for replica in deployments[name]["replicas"])
            for model, name in self._deployments.items()
        }
