"""One small Ray cluster on this machine for all tests of a session."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Four logical CPUs whatever the machine has: Ray Data needs room beside its actors."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=250_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    yield
    ray.shutdown()
