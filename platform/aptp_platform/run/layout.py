"""Where a run keeps what its stages make."""

import tempfile

from aptp.router import Router
from aptp_platform.storage.store import Store


def assigned_router(root: Store) -> Router:
    """The router whose codes are cut, fine-tuned and served."""
    with tempfile.TemporaryDirectory() as scratch:
        return Router.load(root.fetch("assigned/router", scratch))
