"""Build the embedded data set: emoji in three art styles as WebDataset shards.

    .venv/bin/pip install resvg-py==0.5.0
    .venv/bin/python -m examples.emoji.build

Downloads four npm packages of pinned versions with `npm pack`, draws every emoji at 64 x 64 on white, writes four
captions for each and packs lossless WebP shards whose bytes depend only on those packages. Every caption word
comes from CLDR, from the style's name or from the pixels. ATTRIBUTION.md names the sources and their licences.
"""

import argparse
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from examples.emoji.shard import COLOURS, digest, write_shard

PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "metadata": "emojibase-data@17.0.0",
}
SIZE = 64
SAMPLES_PER_SHARD = 500
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GROUP_KINDS = {
    "smileys-emotion": "face", "people-body": "person", "animals-nature": "nature", "food-drink": "food",
    "travel-places": "place", "activities": "object", "objects": "object", "symbols": "sign", "flags": "flag",
}  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    """One emoji of the metadata, whatever the style it is drawn in."""

    hexcode: str  # "1f44b-1f3fb"
    base: str  # the code of the same emoji without a skin tone: the unit that the splits keep together
    label: str
    subgroup: str
    kind: str
    tags: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shards")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".npm", help="where packages are kept")
    args = parser.parse_args()
    folders = {name: fetch(package, args.cache) for name, package in PACKAGES.items()}
    emojis = read_emojis(folders["metadata"])
    samples: dict[str, list[tuple[str, dict[str, bytes]]]] = {"train": [], "test_combo": [], "test_concept": []}
    for style, drawn in draw_all(folders, emojis):
        for emoji, image in drawn:
            split = split_of(style, emoji.base)
            key = f"{style}-{emoji.hexcode}"
            samples[split].append((key, members(style, emoji, image, split)))
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.tar.gz"):
        old.unlink()
    for split, rows in samples.items():
        # Every shard must be a fair sample, for readers that take one after the other: order by a hash of the key.
        rows.sort(key=lambda row: digest(row[0]))
        shards = -(-len(rows) // SAMPLES_PER_SHARD)
        for index in range(shards):
            write_shard(args.out / f"{split}-{index:02d}.tar.gz", rows[index::shards])
        print(f"{split}: {len(rows)} images in {shards} shards")
    print(f"{sum(path.stat().st_size for path in args.out.glob('*.tar.gz')) / 1e6:.1f} MB in {args.out}")


def fetch(package: str, cache: Path) -> Path:
    """Download and unpack one npm package; returns the folder that holds its package.json."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / package.replace("@", "_").replace("/", "_")
    if not folder.exists():
        name = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(cache / name) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def read_emojis(folder: Path) -> list[Emoji]:
    """Every base emoji, and for each that takes a skin tone the variant in one tone, chosen by hash."""
    groups = json.loads((folder / "meta/groups.json").read_text())
    emojis = []
    for record in json.loads((folder / "en/data.json").read_text()):
        if "group" not in record or groups["groups"][str(record["group"])] == "component":
            continue  # regional indicators and loose skin tones are no emoji of their own
        subgroup = groups["subgroups"][str(record["subgroup"])]
        kind = kind_of(groups["groups"][str(record["group"])], subgroup)
        base = record["hexcode"].lower()
        shared = {"base": base, "subgroup": subgroup, "kind": kind, "tags": tuple(record.get("tags", ()))}
        emojis.append(Emoji(hexcode=base, label=tidy(record["label"]), **shared))
        toned = [skin for skin in record.get("skins", ()) if isinstance(skin.get("tone"), int)]
        if toned:
            skin = toned[digest(base) % len(toned)]
            emojis.append(Emoji(hexcode=skin["hexcode"].lower(), label=tidy(skin["label"]), **shared))
    return emojis


def kind_of(group: str, subgroup: str) -> str:
    if subgroup in ("geometric", "heart"):
        return "shape"
    if subgroup.startswith(("hand", "body-parts")):
        return "hand"
    return GROUP_KINDS[group]


def tidy(label: str) -> str:
    """CLDR's short names in everyday words."""
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    name, separator, detail = label.partition(": ")
    return f"{name} with {detail}" if separator and detail.endswith("skin tone") else label.replace(": ", " ")


def draw_all(
    folders: dict[str, Path], emojis: list[Emoji]
) -> Iterator[tuple[str, Iterator[tuple[Emoji, Image.Image]]]]:
    yield "noto", draw_pngs(folders["noto"], "google", emojis)
    yield "twemoji", draw_pngs(folders["twemoji"], "twitter", emojis)
    yield "fluent", draw_icons(folders["fluent"], emojis)


def draw_pngs(folder: Path, vendor: str, emojis: list[Emoji]) -> Iterator[tuple[Emoji, Image.Image]]:
    images = folder / "img" / vendor / str(SIZE)
    by_code = {plain(path.stem): path for path in sorted(images.glob("*.png"))}
    for emoji in emojis:
        path = by_code.get(plain(emoji.hexcode))
        if path is not None:
            yield emoji, Image.open(path).convert("RGBA")


def draw_icons(folder: Path, emojis: list[Emoji]) -> Iterator[tuple[Emoji, Image.Image]]:
    icons = json.loads((folder / "icons.json").read_text())
    names = {plain(code): name for code, name in json.loads((folder / "chars.json").read_text()).items()}
    for emoji in emojis:
        icon = icons["icons"].get(names.get(plain(emoji.hexcode)))
        if icon is not None:
            side = icon.get("width", icons["width"])
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{icon["body"]}</svg>'
            png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
            yield emoji, Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def plain(code: str) -> str:
    """A code point sequence without the variation selector, which the sources write differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def split_of(style: str, base: str) -> str:
    """Hash the base emoji, so that a skin tone of a held-out emoji never stands in the training split."""
    if digest("concept " + base) % 100 < 3:
        return "test_concept"
    # One style of one emoji in about seven is held out; the other two styles of it are trained on.
    chosen = digest("combo " + base)
    return "test_combo" if chosen % 100 < 14 and ("noto", "twemoji", "fluent")[chosen // 100 % 3] == style else "train"


def members(style: str, emoji: Emoji, image: Image.Image, split: str) -> dict[str, bytes]:
    pixels = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if pixels.size != (SIZE, SIZE):
        pixels = pixels.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    captions = captions_of(style, emoji, colours_of(image))
    webp = io.BytesIO()
    pixels.save(webp, "WEBP", lossless=True, method=6)
    record = {
        "captions": captions, "style": style, "kind": emoji.kind, "label": emoji.label, "base": emoji.base,
        "split": split,
    }  # fmt: skip
    chosen = captions[digest(style + emoji.hexcode) % len(captions)]
    return {"webp": webp.getvalue(), "txt": chosen.encode(), "json": json.dumps(record, ensure_ascii=False).encode()}


def captions_of(style: str, emoji: Emoji, colours: list[str]) -> list[str]:
    tags = [tag for tag in emoji.tags if tag.lower() not in emoji.label.lower()] or [emoji.subgroup]
    shown = sorted(tags, key=lambda tag: digest(style + emoji.hexcode + tag))[: 1 + digest(emoji.hexcode) % 4]
    mostly = " and ".join(colours[:2])
    return [
        f"{style} emoji of {emoji.label}",
        f"{emoji.label}, {emoji.subgroup.replace('-', ' ')}, {', '.join(shown)}, {style}",
        f"{mostly} {emoji.label}, {style}",
        f"{emoji.label} icon in {style} showing {', '.join(shown)}, mostly {mostly}",
    ]


def colours_of(image: Image.Image) -> list[str]:
    """Named colours that cover over 15 % of the opaque pixels, the widest first; never empty."""
    rgba = np.asarray(image, dtype=np.float32).reshape(-1, 4)
    opaque = rgba[rgba[:, 3] > 127, :3]
    if not len(opaque):
        return ["white"]
    palette = np.asarray(list(COLOURS.values()), dtype=np.float32)
    nearest = ((opaque[:, None] - palette) ** 2).sum(-1).argmin(-1)
    share = np.bincount(nearest, minlength=len(palette)) / len(opaque)
    order = np.argsort(-share, kind="stable")
    names = list(COLOURS)
    return [names[i] for i in order if share[i] > 0.15] or [names[order[0]]]


if __name__ == "__main__":
    main()
