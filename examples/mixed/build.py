"""Build a data set whose prompts need unlike capacity by construction, as WebDataset shards.

    .venv/bin/python -m examples.mixed.build

Equal parts of three kinds: `plain`, a tile of one colour; `single`, one emoji; `crowd`, four emoji in a square. The
emoji are those of `examples/emoji/shards`, so nothing is downloaded, and the shards' bytes depend on nothing else. A
kind is described in many ways: no single word, first or not, gives it away. One row in ten is held out.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from aptp_platform.data.formats.tar import read_shard
from aptp_platform.data.sample import Fault
from examples.emoji.shard import COLOURS, digest, write_shard

SIZE = 32
ROWS = 1600  # of each kind
ROWS_PER_SHARD = 480
PLAIN = (
    "plain {} tile", "nothing but {}", "{} all over", "an even {} surface", "{} background, empty", "flat {} card",
    "only {} paint", "a sheet of {} paper", "{} wall", "solid {}", "pure {} colour", "one patch of {}",
)  # fmt: skip
TONES = ("", "pale ", "deep ", "warm ", "cool ", "dull ", "bright ", "soft ")
CROWD = ("{}, {}, {} and {}", "four things: {}, {}, {}, {}", "{} beside {}, above {} and {}", "{} + {} + {} + {}")

Emoji = tuple[str, str, Image.Image]  # key, label and picture
Row = tuple[str, str, str, Image.Image]  # key, kind, caption and picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, default=Path("examples/emoji/shards"))
    parser.add_argument("--out", type=Path, default=Path("runs/mixed/shards"))
    args = parser.parse_args()
    build(args.emoji, args.out)


def build(shards: Path, out: Path) -> None:
    """Write the data set into `out`, whose old shards it replaces."""
    emoji = list(read_emoji(shards))
    rows = sorted([*plain(), *single(emoji), *crowd(emoji)], key=lambda row: digest(row[0]))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.tar.gz"):
        old.unlink()
    for split, mine in (("test_mixed", rows[::10]), ("train", [row for number, row in enumerate(rows) if number % 10])):
        count = -(-len(mine) // ROWS_PER_SHARD)
        for index in range(count):
            write_shard(out / f"{split}-{index:02d}.tar.gz", [members(*row) for row in mine[index::count]])
        print(f"{split}: {len(mine)} images in {count} shards")


def read_emoji(shards: Path) -> Iterator[Emoji]:
    for path in sorted(shards.glob("*.tar.gz")):
        with path.open("rb") as stream:
            for row in read_shard(stream, path.name):
                if isinstance(row, Fault):
                    raise ValueError(f"{path.name}: {row.key}: {row.cause}: {row.detail}")
                label = row.captions[0].split(" emoji of ", 1)[-1]
                yield row.key, label, Image.open(io.BytesIO(row.image)).convert("RGB")


def plain() -> Iterator[Row]:
    for number in range(ROWS):
        key = f"plain-{number:04d}"
        draw = random.Random(key)
        colour, tone = draw.choice(list(COLOURS)), draw.choice(TONES)
        value = tuple(min(255, max(0, level + draw.randint(-12, 12))) for level in COLOURS[colour])
        yield key, "plain", draw.choice(PLAIN).format(tone + colour), Image.new("RGB", (SIZE, SIZE), value)


def single(emoji: list[Emoji]) -> Iterator[Row]:
    for key, label, picture in sorted(emoji, key=lambda each: digest("single " + each[0]))[:ROWS]:
        style = key.split("-")[0]
        caption = random.Random(key).choice(("{label}", "{label}, {style}", "{style} emoji of {label}", "one {label}"))
        yield f"single-{key}", "single", caption.format(label=label, style=style), shrink(picture, SIZE)


def crowd(emoji: list[Emoji]) -> Iterator[Row]:
    for number in range(ROWS):
        key = f"crowd-{number:04d}"
        draw = random.Random(key)
        chosen = draw.sample(emoji, 4)
        page = Image.new("RGB", (SIZE, SIZE), "white")
        for place, (_, _, picture) in enumerate(chosen):
            page.paste(shrink(picture, SIZE // 2), (place % 2 * SIZE // 2, place // 2 * SIZE // 2))
        yield key, "crowd", draw.choice(CROWD).format(*(label for _, label, _ in chosen)), page


def shrink(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def members(key: str, kind: str, caption: str, picture: Image.Image) -> tuple[str, dict[str, bytes]]:
    webp = io.BytesIO()
    picture.save(webp, "WEBP", lossless=True, method=6)
    record = {"captions": [caption], "kind": kind}
    return key, {"webp": webp.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}


if __name__ == "__main__":
    main()
