"""Captioned images out of WebDataset shards, tolerantly: what is readable is yielded, the rest becomes a `Fault`.

A shard is a tar or tar.gz. Members that share a name up to the first dot are one sample: an image (`jpg`, `jpeg`,
`png`, `webp`), and captions from `json` (a list under `captions`, or a string under `caption`) or else from `txt`.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from aptp_platform.data.sample import CaptionedImage, Fault, sample_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def read_shard(stream: IO[bytes], name: str) -> Iterator[CaptionedImage | Fault]:
    """Samples of one shard in their stored order; a shard that breaks off yields a fault after what could be read.

    Args:
        stream: the raw bytes of a `.tar` or `.tar.gz`; it is read once, forwards.
        name: what faults call this shard.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictMember) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                if folder + slash + stem != key:
                    if key is not None:
                        yield _sample(key, parts)
                    key, parts = folder + slash + stem, {}
                opened = archive.extractfile(member)
                assert opened is not None  # it is a file
                parts[extension.lower()] = opened.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Fault(name, "shard", f"{type(error).__name__}: {error}")
        return  # the last sample may be cut in two
    if key is not None:
        yield _sample(key, parts)
    else:
        yield Fault(name, "shard", "holds no sample")


class _StrictMember(tarfile.TarInfo):
    """tarfile takes a damaged header, or a file that stops after a member, for the end of the archive, and rows would
    be missing silently. The real end is the block of zeros that closes every archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictMember":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the typeshed does not know it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"breaks off: {error}") from None


def _sample(key: str, parts: dict[str, bytes]) -> CaptionedImage | Fault:
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    if image is None:
        return Fault(key, "image", f"no member ends in any of {', '.join(IMAGE_EXTENSIONS)}")
    record: dict[str, Any] = {}
    if "json" in parts:
        try:
            loaded = json.loads(parts["json"])
        except ValueError as error:
            return Fault(key, "caption", f"its json does not parse: {error}")
        record = loaded if isinstance(loaded, dict) else {}
    several, one = record.pop("captions", None), record.pop("caption", None)
    given = several or one
    if given is None and "txt" in parts:
        given = parts["txt"].decode("utf-8", "replace")
    return sample_of(key, image, given, record)
