"""A report as one HTML file that holds its pictures: nothing but text, tables, figures and captions."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.25rem;margin-top:2.6rem}h3{font-size:1.05rem;margin-top:1.8rem}
p,li,figcaption{max-width:52rem}figure{margin:1rem 0}figure>img{max-width:100%;height:auto}
table{border-collapse:collapse}td,th{padding:.25rem .7rem;text-align:left;vertical-align:top}
td,th{border-bottom:1px solid #ddd}td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.picture{width:152px;height:152px;object-fit:contain;image-rendering:pixelated;display:block}
.row{display:flex;gap:.4rem}.scroll{overflow-x:auto}.lead{font-size:1.1rem}
td.text{max-width:15rem}td.text small{color:#666;display:block;min-width:8rem}td.shown{padding:.25rem .2rem}
"""


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    path.write_text(head + "\n".join([f"<h1>{escape(title)}</h1>", *sections]))


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    return f"<p class={kind}>{escape(text)}</p>" if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def figure(drawn: Figure, sentence: str, path: Path) -> str:
    """A figure with the sentence that says what it shows; also written as a PNG file of its own."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=110)
    path.write_bytes(buffer.getvalue())
    picture = f'<img src="{_data(buffer.getvalue())}" alt="{escape(sentence, quote=True)}">'
    return f"<figure>{picture}<figcaption>{escape(sentence)}</figcaption></figure>"


def picture(png: bytes, caption: str) -> str:
    told = escape(caption, quote=True)
    return f'<img class=picture src="{_data(png)}" alt="{told}" title="{told}">'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as `text`, `number` or `pictures` make them."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"


def text(line: str, note: str = "") -> str:
    return f"<td class=text>{escape(line)}{f'<small>{escape(note)}</small>' if note else ''}</td>"


def shown(png: bytes | None, caption: str) -> str:
    return f"<td class=shown>{'' if png is None else picture(png, caption)}</td>"


def number(value: float | None, form: str = "{:.3f}", interval: Sequence[float] | None = None) -> str:
    """A number with its interval; empty where it was not measured."""
    if value is None:
        return "<td class=number></td>"
    ends = "" if interval is None else f" [{', '.join(form.format(end) for end in interval)}]"
    return f"<td class=number>{form.format(value)}{ends}</td>"


def pictures(pngs: Iterable[bytes], captions: Iterable[str]) -> str:
    return f"<td><div class=row>{''.join(map(picture, pngs, captions))}</div></td>"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
