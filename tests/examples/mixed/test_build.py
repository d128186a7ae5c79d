"""The data set whose prompts need unlike capacity: three kinds in equal parts, the same bytes on every machine."""

from collections import Counter
from pathlib import Path

import pytest

from aptp_platform.data.formats.tar import read_shard
from aptp_platform.data.sample import CaptionedImage, decode_image
from examples.mixed import build

EMOJI = Path("examples/emoji/shards")


def rows_of(folder: Path, pattern: str) -> list[CaptionedImage]:
    found: list[CaptionedImage] = []
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as stream:
            rows = list(read_shard(stream, path.name))
        for row in rows:
            assert isinstance(row, CaptionedImage), row
            found.append(row)
    return found


def test_three_kinds_in_equal_parts_and_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", 30)
    for name in ("one", "two"):
        build.build(EMOJI, tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    train, held = (rows_of(tmp_path / "one", pattern) for pattern in ("train-*", "test_*"))
    assert len(train) == 81
    assert len(held) == 9
    assert not {row.key for row in train} & {row.key for row in held}
    kinds = Counter(row.key.split("-")[0] for row in train + held)
    assert kinds == {"plain": 30, "single": 30, "crowd": 30}
    spread = {row.key.split("-")[0]: decode_image(row.image, 32).std(axis=(1, 2)).max() for row in train}
    assert spread["plain"] == 0
    assert min(spread["single"], spread["crowd"]) > 10
