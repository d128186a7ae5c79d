"""Captioned images out of WebDataset shards, tolerantly: what is readable is yielded, the rest becomes a `Fault`.

A shard is a tar or tar.gz, or several of them joined. Members that share a name up to the first dot and stand together
are one sample: an image (`jpg`, `jpeg`, `png`, `webp`), and captions from `json` (a list under `captions`, or a string
under `caption`) or else from `txt`.
"""

import bz2
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

from aptp_platform.data.sample import LARGEST_IMAGE, CaptionedImage, Fault, sample_of
from aptp_platform.storage.errors import StoreError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("json", "txt")
JUNK = ("Thumbs.db", "desktop.ini", ".DS_Store")  # that file managers leave
_COMPRESSED: Final[dict[bytes, Callable[[IO[bytes]], Any]]] = {  # by first bytes
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_SORT = "the members of a sample must stand next to each other: sort them by name"


def read_shard(stream: IO[bytes], name: str) -> Iterator[CaptionedImage | Fault]:
    """Samples of one shard in their stored order; a shard that breaks off yields a fault after what could be read.

    Args:
        stream: the raw bytes of a `.tar` or `.tar.gz`; it is read once, forwards.
        name: what faults call this shard.
    """
    sample: _Sample | None = None
    good: dict[str, bool] = {}  # of the keys that were read
    archive: Any = None
    try:
        with tarfile.open(fileobj=_plain(stream), mode="r|", tarinfo=_StrictMember, ignore_zeros=True) as archive:
            for member in archive:
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                if not (member.isfile() or _is_link(member)) or _is_junk(folder, base):
                    continue
                stem, _, ending = base.partition(".")
                key, ending = folder + slash + stem, ending.lower()
                if sample is None or sample.key != key or (sample.is_whole and ending in sample.parts):
                    if sample is not None:
                        yield from sample.rows(good)
                    sample = _Sample(key)
                sample.add(archive, member, ending)
    except StoreError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError) as error:
        if sample is not None and getattr(archive, "has_ended", False):
            yield from sample.rows(good)  # else the last sample may be cut in two
        yield Fault(name, "shard", f"{type(error).__name__}: {error}")
        return
    if sample is not None:
        yield from sample.rows(good)
    if not good:
        yield Fault(name, "shard", "holds no sample")


class _StrictMember(tarfile.TarInfo):
    """tarfile takes a damaged header, or a file that stops after a member, for the end of the archive, and rows would
    be missing silently. The real end is the block of zeros that closes every archive; another archive may follow."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> "_StrictMember":
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the typeshed does not know it
            archive.has_ended = True
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if getattr(archive, "has_ended", False):
                raise
            raise tarfile.ReadError(f"breaks off: {error}") from None
        except tarfile.HeaderError as error:
            what = "what is joined to its end is no archive" if getattr(archive, "has_ended", False) else "breaks off"
            raise tarfile.ReadError(f"{what}: {error}") from None
        archive.has_ended = False
        return member

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictMember":
        if 0 < len(buf) < tarfile.BLOCKSIZE and not buf.strip(b"\0"):
            raise tarfile.EOFHeaderError("zeros at the end")  # type: ignore[attr-defined]
        return super().frombuf(buf, encoding, errors)


class _Sample:
    """The members that stand together under one key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.parts: dict[str, bytes] = {}
        self._others: list[str] = []  # endings that no sample needs
        self._dotted: dict[str, set[str]] = {}  # key by the LAST dot of a name with several: its endings
        self._wrong = ""  # why it can be no row

    @property
    def is_whole(self) -> bool:
        has_caption = any(ending in self.parts for ending in CAPTION_EXTENSIONS)
        return has_caption and any(ending in self.parts for ending in IMAGE_EXTENSIONS)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> None:
        dotted, _, last = ending.rpartition(".")
        if last not in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS:
            self._others.append(ending)
        elif dotted:
            self._dotted.setdefault(f"{self.key}.{dotted}", set()).add(last)
        elif ending in self.parts:
            self._wrong = f"holds {ending} twice before it is whole; {_SORT}"
        elif not member.isfile():
            self._wrong = (
                f"{member.name} is a link to {member.linkname or 'a device'}, which a shard read forwards cannot "
                "follow: archive it with tar --dereference --hard-dereference"
            )
        elif member.size > LARGEST_IMAGE:
            self._wrong = f"{member.name} has {member.size} bytes; a member has at most {LARGEST_IMAGE}"
        else:
            opened = archive.extractfile(member)
            assert opened is not None  # it is a file
            self.parts[ending] = opened.read()

    def rows(self, good: dict[str, bool]) -> Iterator[CaptionedImage | Fault]:
        """The sample, or what is wrong with it, unless that was told when its first members came.

        Args:
            good: of the keys so far, whether they gave a sample; this one's is added.
        """
        alone = bool(self.parts or self._wrong or not self._dotted)
        for key, endings in self._dotted.items():
            if not alone or (endings & {*IMAGE_EXTENSIONS} and endings & {*CAPTION_EXTENSIONS}):
                good[key] = False
                yield Fault(
                    key, "image", f"a name's ending begins at its first dot, so this is a part of {self.key}: "
                    "put another sign in the place of all dots but the last",
                )  # fmt: skip
        if not alone:
            return
        row = self._row()
        if not self.is_whole and self.key in good and not self._wrong:
            if not good[self.key]:
                return
            row = Fault(self.key, "caption", f"its {self._endings} stands apart from its other members; {_SORT}")
        good[self.key] = good.get(self.key, False) or isinstance(row, CaptionedImage)
        yield row

    @property
    def _endings(self) -> str:
        return ", ".join([*self.parts, *self._others, *self._dotted]) or "name"

    def _row(self) -> CaptionedImage | Fault:
        if self._wrong:
            return Fault(self.key, "image", self._wrong)
        image = next((self.parts[ending] for ending in IMAGE_EXTENSIONS if ending in self.parts), None)
        if image is None:
            wanted = ", ".join(IMAGE_EXTENSIONS)
            return Fault(self.key, "image", f"no member ends in any of {wanted}, there is {self._endings}; {_SORT}")
        record: Any = {}
        if self.parts.get("json", b"").strip():
            try:
                record = json.loads(self.parts["json"])
            except (ValueError, RecursionError) as error:
                return Fault(self.key, "caption", f"its json does not parse: {error}")
        rest = dict(record) if isinstance(record, dict) else {}
        given = [rest.pop("captions", None), rest.pop("caption", None), self.parts.get("txt")]
        lacks = f"there is {self._endings}; {_SORT}"
        if not isinstance(record, dict):
            lacks = f"its json is a {type(record).__name__}, no object"
        return sample_of(self.key, image, given, rest, lacks)


def _plain(stream: IO[bytes]) -> Any:
    """The tar in a stream. tarfile's own decompression ends at the first of several joined files, and checks no sum."""
    head = stream.read(max(map(len, _COMPRESSED)))
    stream.seek(0)
    return next((opened(stream) for mark, opened in _COMPRESSED.items() if head.startswith(mark)), stream)


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.issym() or member.islnk() or member.isdev()


def _is_junk(folder: str, base: str) -> bool:
    return base.startswith("._") or base in JUNK or "__MACOSX" in folder.split("/")
