"""POT's solver, without the array libraries that it would start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _torch_and_numpy_alone() -> Iterator[None]:
    """`import ot` imports JAX, CuPy and TensorFlow where they are installed, and JAX then takes 75 % of a GPU's memory.

    POT can be told so by environment variables only, which it reads at its import. The environment is left as it was:
    child processes inherit none of it.
    """
    names = [f"POT_BACKEND_DISABLE_{library}" for library in ("JAX", "CUPY", "TENSORFLOW")]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


with _torch_and_numpy_alone():
    from ot import emd

__all__ = ["emd"]
