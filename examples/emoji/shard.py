"""What the builders of data sets share: named colours, a hash that orders rows, and shards of reproducible bytes."""

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

COLOURS = {
    "black": (25, 25, 25), "dark gray": (85, 85, 85), "gray": (140, 140, 140), "light gray": (200, 205, 210),
    "white": (250, 250, 250), "red": (215, 45, 50), "dark red": (130, 25, 30), "orange": (245, 140, 35),
    "yellow": (255, 205, 60), "green": (80, 165, 60), "dark green": (35, 95, 45), "light blue": (120, 195, 240),
    "blue": (45, 110, 200), "purple": (130, 75, 180), "pink": (240, 130, 165), "brown": (125, 80, 50),
}  # fmt: skip


def write_shard(path: Path, rows: list[tuple[str, dict[str, bytes]]]) -> None:
    """A tar.gz whose bytes depend on its members alone (no clock, no owner)."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=9, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for key, parts in rows:
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
