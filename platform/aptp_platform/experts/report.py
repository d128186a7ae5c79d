"""An evaluation as a person reads it: metrics.json, two figures and a page that shows them."""

import base64
import html
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from aptp_platform.run.layout import EVALUATED
from aptp_platform.storage.store import Store

SHOWN = 24


def write_report(
    store: Store, metrics: dict[str, Any], captions: list[str], thumbnails: dict[str, list[bytes]]
) -> None:
    """Publish the report as `evaluated/` in `store`, metrics.json last."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _draw_arms(folder / "arms.png", metrics)
        _draw_codes(folder / "codes.png", metrics)
        (folder / "report.html").write_text(_page(folder, metrics, captions, thumbnails))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        store.publish(folder, EVALUATED, last=["metrics.json"])


def _draw_arms(path: Path, metrics: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (field, title) in zip(
        axes,
        (("denoising_loss", "held-out denoising loss"), ("cmmd_lite0", "CMMD-lite0 of generated images")),
        strict=True,
    ):
        for arm, facts in metrics["arms"].items():
            axis.scatter(facts["macs_ratio"], facts[field], s=60, label=arm)
        axis.set(xlabel="mean MACs ratio over the prompts", title=f"{title} (lower is better)", xlim=(0, 1.05))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_codes(path: Path, metrics: dict[str, Any]) -> None:
    figure, (codes, kinds) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    rows = metrics["codes"]
    bars = codes.bar([f"{row['code']:02d}" for row in rows], [row["macs_ratio"] for row in rows], color="#4878a8")
    codes.bar_label(bars, [f"{100 * row['share']:.0f} %" for row in rows], fontsize=8)
    codes.set(
        xlabel="code (share of the held-out prompts)", ylabel="MACs ratio", title="capacity of each code", ylim=(0, 1.1)
    )
    table = sorted(metrics["kinds"]["table"].items(), key=lambda item: item[1]["routed_ratio"])
    kinds.barh([kind for kind, _ in table], [facts["routed_ratio"] for _, facts in table], color="#a86848")
    kinds.set(xlabel="mean routed MACs ratio", title="capacity by kind of prompt")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _page(folder: Path, metrics: dict[str, Any], captions: list[str], thumbnails: dict[str, list[bytes]]) -> str:
    arms = "".join(
        f"<tr><td>{html.escape(arm)}</td><td>{facts['macs_ratio']:.3f}</td><td>{facts['denoising_loss']:.4f}</td>"
        f"<td>{facts['cmmd_lite0']:.3f}</td></tr>"
        for arm, facts in metrics["arms"].items()
    )
    count = min([SHOWN, *map(len, thumbnails.values())])
    pictures = "".join(
        f"<tr><th>{html.escape(arm)}</th>"
        + "".join(f"<td>{_image(images[i], captions[i])}</td>" for i in range(count))
        + "</tr>"
        for arm, images in thumbnails.items()
    )
    figures = "".join(_image((folder / name).read_bytes(), name) for name in ("arms.png", "codes.png"))
    return (
        "<!doctype html><meta charset=utf-8><title>APTP evaluation</title>"
        "<style>body{font:15px/1.5 system-ui;margin:2em;max-width:70em}td,th{padding:.2em .6em;text-align:left}"
        ".wide{overflow-x:auto}</style>"
        f"<h1>Evaluation on {metrics['held_out']} held-out captioned images</h1>"
        f"<table><tr><th>arm<th>MACs ratio<th>denoising loss<th>CMMD-lite0</tr>{arms}</table>{figures}"
        f"<h2>Same prompts, same seeds</h2><div class=wide><table>{pictures}</table></div>"
        f"<pre>{html.escape(json.dumps(metrics['experts_minus_baselines'], indent=1))}</pre>"
    )


def _image(data: bytes, title: str) -> str:
    return (
        f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" title="{html.escape(title, quote=True)}">'
    )
