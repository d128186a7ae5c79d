"""Build a data set whose prompts need unlike capacity by construction, as WebDataset shards.

    .venv/bin/python -m examples.mixed.build

Equal parts of two kinds: `emoji`, pictures of `examples/emoji/shards`, which the denoiser must know; and `grain`, rough
surfaces, every pixel drawn for itself around one colour. Of grain there is nothing to know but its colour, so a small
network denoises it as well as a large one. A kind is described in many ways: no single word, first or not, gives it
away. Nothing is downloaded, and the shards' bytes depend on nothing but the emoji's. Held-out emoji stay held out.
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

SIZE = 64
ROWS = {"train": 1920, "test": 240}  # of each kind
ROWS_PER_SHARD = 480
GRAIN = (
    "{} sand", "{} gravel", "grains of {}", "{} static on a screen", "noise in {}", "{} speckles all over",
    "rough {} stone", "{} carpet seen from above", "{} felt, close up", "a surface of {} dust", "film grain, {}",
    "{} sandpaper",
)  # fmt: skip
EMOJI = ("{label}", "{label}, {style}", "{style} emoji of {label}", "one {label}")
TONES = ("", "pale ", "deep ", "warm ", "cool ", "dull ", "bright ", "soft ")
ROUGH = 60  # standard deviation of a pixel's brightness, of 255

Row = tuple[str, str, str, Image.Image]  # key, kind, caption and picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, default=Path("examples/emoji/shards"))
    parser.add_argument("--out", type=Path, default=Path("runs/mixed/shards"))
    args = parser.parse_args()
    build(args.emoji, args.out)


def build(shards: Path, out: Path) -> None:
    """Write the data set into `out`, whose old shards it replaces."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.tar.gz"):
        old.unlink()
    for split, written in (("train", "train"), ("test", "test_mixed")):
        rows = sorted([*emoji(shards, split), *grain(split)], key=lambda row: digest(row[0]))
        count = -(-len(rows) // ROWS_PER_SHARD)
        for index in range(count):
            write_shard(out / f"{written}-{index:02d}.tar.gz", [members(*row) for row in rows[index::count]])
        print(f"{written}: {len(rows)} images in {count} shards")


def emoji(shards: Path, split: str) -> Iterator[Row]:
    found = []
    for path in sorted(shards.glob(f"{split}*.tar.gz")):
        with path.open("rb") as stream:
            for row in read_shard(stream, path.name):
                if isinstance(row, Fault):
                    raise ValueError(f"{path.name}: {row.key}: {row.cause}: {row.detail}")
                found.append(row)
    found.sort(key=lambda row: digest(f"mixed {row.key}"))
    for row in found[: ROWS[split]]:
        label, style = row.captions[0].split(" emoji of ", 1)[-1], row.key.split("-")[0]
        caption = random.Random(row.key).choice(EMOJI).format(label=label, style=style)
        picture = Image.open(io.BytesIO(row.image)).convert("RGB")
        yield f"emoji-{row.key}", "emoji", caption, picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def grain(split: str) -> Iterator[Row]:
    for number in range(ROWS[split]):
        key = f"grain-{split}-{number:04d}"
        draw = random.Random(key)
        colour, tone = draw.choice(list(COLOURS)), draw.choice(TONES)
        caption = draw.choice(GRAIN).format(tone + colour)
        pixels = bytearray()
        for _ in range(SIZE * SIZE):
            rough = draw.gauss(0, ROUGH)
            levels = (level + rough + draw.gauss(0, ROUGH / 2) for level in COLOURS[colour])
            pixels += bytes(min(255, max(0, round(level))) for level in levels)
        yield key, "grain", caption, Image.frombytes("RGB", (SIZE, SIZE), bytes(pixels))


def members(key: str, kind: str, caption: str, picture: Image.Image) -> tuple[str, dict[str, bytes]]:
    webp = io.BytesIO()
    picture.save(webp, "WEBP", lossless=True, method=4)
    record = {"captions": [caption], "kind": kind}
    return key, {"webp": webp.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}


if __name__ == "__main__":
    main()
