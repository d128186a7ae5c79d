"""The data set whose prompts need unlike capacity: two kinds in equal parts, the same bytes on every machine."""

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


def test_two_kinds_in_equal_parts_and_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", {"train": 20, "test": 5})
    for name in ("one", "two"):
        build.build(EMOJI, tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    train, held = (rows_of(tmp_path / "one", pattern) for pattern in ("train-*", "test_*"))
    assert not {row.key for row in train} & {row.key for row in held}
    for rows, each in ((train, 20), (held, 5)):
        assert Counter(row.key.split("-")[0] for row in rows) == {"emoji": each, "grain": each}
    known = {row.key for row in rows_of(EMOJI, "train-*")}
    assert {row.key.removeprefix("emoji-") in known for row in train if row.key.startswith("emoji")} == {True}
    assert {row.key.removeprefix("emoji-") in known for row in held} == {False}
    for row in train + held:
        pixels = decode_image(row.image, 64).astype(int)
        rough = abs(pixels[:, 1:] - pixels[:, :-1]).mean()
        assert (rough > 36) == row.key.startswith("grain"), (row.key, rough)
