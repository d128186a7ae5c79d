"""A key that no schema knows: the name that was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The known name that is spelt most alike, if its similarity (0 to 1) reaches `cutoff`."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """One line for a dotted key whose last part is not among the known names."""
    where, dot, name = key.rpartition(".")
    known = list(known)
    return f"{key}: unknown key; did you mean {where}{dot}{nearest(name, known)}? Known: {', '.join(known)}"
