"""A contact sheet: one column per prompt, the teacher's image above, the routed expert's below."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, TEXT = 160, 12, 46


def write_gallery(path: Path, columns: Sequence[tuple[str, str, Image.Image, Image.Image]]) -> None:
    """Write a PNG of (prompt, note, image above, image below) columns; the file appears whole or not at all."""
    width, height = GAP + len(columns) * (TILE + GAP), TEXT + 2 * (TILE + GAP) + 24
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, (prompt, note, above, below) in enumerate(columns):
        left = GAP + index * (TILE + GAP)
        draw.multiline_text((left, 6), textwrap.fill(prompt, 22), fill="black", font=font)
        for row, image in enumerate((above, below)):
            top = TEXT + row * (TILE + GAP)
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
            draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline="#cccccc")
        draw.text((left, height - 26), note, fill="#555555", font=font)
    scratch = path.with_suffix(".new.png")
    sheet.save(scratch)
    scratch.replace(path)
