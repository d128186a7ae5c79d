"""Captions out of whatever a format stores, and what tells damaged text: a row is good only if a person can read it."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Final

LONGEST_CAPTION: Final = 10_000  # characters: what is longer is a file that was split at the wrong places
_MARKS: Final = (  # longest first: a mark of UTF-32 begins with one of UTF-16
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# Control characters but tab and line ends, halves of a surrogate pair, and what decoders put for unreadable bytes.
_DAMAGE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
_MARGIN: Final = "\ufeff\u200b\u2060"  # byte order mark and spaces of no width, which `str.strip` keeps
_BLANK: Final = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that print nothing


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning names."""
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)


def decode_text(data: bytes) -> str:
    """Text of UTF-8, or of the encoding that its byte order mark names.

    Raises:
        ValueError: it is not.
    """
    encoding = marked_encoding(data) or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        shown = data[error.start : error.start + 1].hex()
        raise ValueError(
            f"is not {encoding.removesuffix('-sig')} (byte {shown} at {error.start}); convert it to UTF-8"
        ) from None


def first_captions(candidates: Iterable[Any]) -> tuple[str, ...]:
    """The captions of the first candidate that has any: a string, bytes of one, or a list of them, in their order.

    Nulls and texts that print nothing are no captions.

    Raises:
        ValueError: a candidate is of another type, or text is damaged.
    """
    for candidate in candidates:
        several = candidate if isinstance(candidate, list | tuple) else [candidate]
        found = tuple(text for each in several if (text := _caption(each)))
        if found:
            return found
    return ()


def printable(text: str) -> str:
    """The same text, with escapes in the place of what cannot be stored: halves of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def _caption(value: Any) -> str:
    if value is None:
        return ""
    text = decode_text(value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise ValueError(f"is of type {type(text).__name__}; it must be a string or a list of strings")
    text = text.strip().strip(_MARGIN).strip()
    if damage := _DAMAGE.search(text):
        raise ValueError(f"is damaged: it holds U+{ord(damage[0]):04X} at character {damage.start()}")
    if len(text) > LONGEST_CAPTION:
        raise ValueError(f"has {len(text)} characters; at most {LONGEST_CAPTION} are a caption")
    return text if any(map(_prints, text)) else ""


def _prints(character: str) -> bool:
    return character not in _BLANK and unicodedata.category(character) not in ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")
