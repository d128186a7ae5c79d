"""The whole path on this machine: a Ray cluster, one submitted job, the server, images of both models.

python -m examples.emoji.demo [--fresh] [--config jobs/configs/demo.yaml] [--set section.field=value]
"""

import argparse
import asyncio
import base64
import io
import logging
import re
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import yaml
from PIL import Image
from ray.job_submission import JobStatus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from aptp_platform.config import ConfigError
from aptp_platform.config_file import load_config
from aptp_platform.run.cluster import ClusterError, LocalCluster, port_is_free
from aptp_platform.run.path import forget
from aptp_platform.run.progress import parse_line
from aptp_platform.run.stages import STAGES
from examples.emoji.gallery import write_gallery

PROMPTS = (
    "noto emoji of red heart", "twemoji emoji of grinning face", "fluent emoji of red apple", "noto emoji of cat face",
    "fluent emoji of blue circle", "noto emoji of man lifting weights", "twemoji emoji of flag of Mozambique",
    "noto emoji of police car",
)  # fmt: skip
SERVE_SECONDS = 120.0
LOG = Path("runs/demo.log")  # of a job that failed


@dataclass(frozen=True)
class Shown:
    """One prompt as both models drew it."""

    prompt: str
    code: str
    ratio: float
    expert_ms: float
    teacher_ms: float
    expert: Image.Image
    teacher: Image.Image


class DemoError(Exception):
    """A step of the demo failed; the message is one line that says why."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="jobs/configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--serve-config", default="serve_configs/demo.yaml")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier demo finished")
    parser.add_argument("--serve", action="store_true", help="only serve the release of an earlier demo, until ^C")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    logging.disable(logging.WARNING)  # Ray's clients log what they upload and what they skip
    try:
        (_serve if args.serve else _run)(args, console)
    except (ValueError, DemoError, ClusterError) as error:
        console.print(f"error: {error}", style="bold red", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted: every process is ended, finished stages are kept")
        sys.exit(130)


def _run(args: argparse.Namespace, console: Console) -> None:
    started = time.monotonic()
    config = load_config(args.config, args.set)
    root = Path(config.root).absolute()
    # Jobs run in an uploaded copy of the tree, so what they read and write outside it is named by absolute paths.
    places = {"root": config.root, "data.source": config.data.source, "model.pipeline": config.model.pipeline}
    overrides = [f"{field}={_absolute(place)}" for field, place in places.items()]
    serve = _serve_config(Path(args.serve_config), root / "release")
    if args.fresh:
        forget(config)
    root.mkdir(parents=True, exist_ok=True)
    with LocalCluster(num_cpus=4, object_store_bytes=500_000_000) as cluster:
        console.print(f"Ray runs for this demo alone: dashboard {cluster.dashboard}", highlight=False)
        command = f"python jobs/run_pipeline.py --config {args.config}"
        _submit(cluster, command, [*args.set, *overrides], console)
        console.print("\n[bold]serve[/bold]: ingress, router and one deployment per code")
        with _deploy(cluster, serve) as client:
            shown = _draw_all(client, console)
    gallery = root / "gallery.png"
    write_gallery(gallery, [(row.prompt, f"{row.code} {row.ratio:.2f}", row.teacher, row.expert) for row in shown])
    _print_table(console, shown)
    console.print(f"gallery (teacher above, routed expert below): {gallery}", highlight=False, soft_wrap=True)
    console.print(f"report: {root / 'release' / 'report' / 'report.html'}", highlight=False, soft_wrap=True)
    again = f"python -m examples.emoji.demo --serve --config {args.config} --serve-config {args.serve_config}"
    console.print(f"serve it again: {again}", highlight=False, soft_wrap=True)
    console.print(f"took {(time.monotonic() - started) / 60:.1f} minutes")


def _serve(args: argparse.Namespace, console: Console) -> None:
    """Serve the release that an earlier demo made, on a cluster of its own, until interrupted."""
    config = load_config(args.config, args.set)
    release = Path(config.root).absolute() / "release"
    if not (release / "release.json").exists():
        raise ConfigError(f"release: {release} holds no release.json; run make demo first")
    serve = _serve_config(Path(args.serve_config), release)
    with LocalCluster(num_cpus=4, object_store_bytes=300_000_000) as cluster, _deploy(cluster, serve) as client:
        console.print(f"serving {release} at {client.base_url} (^C ends it)", highlight=False, soft_wrap=True)
        while True:
            cluster.require_alive()
            time.sleep(1)


@contextmanager
def _deploy(cluster: LocalCluster, serve: dict[str, Any]) -> Iterator[httpx.Client]:
    """What `serve deploy` does; yields a client of the application once it is ready."""
    cluster.serve().deploy_applications(serve)
    url = f"http://127.0.0.1:{serve['http_options']['port']}"
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:  # never through a proxy
        _wait_ready(client, cluster)
        yield client


def _submit(cluster: LocalCluster, command: str, overrides: list[str], console: Console) -> None:
    """What `ray job submit` does, with its progress lines as bars and the stages' other lines printed."""
    entry = " ".join([command, *(f"--set {shlex.quote(override)}" for override in overrides)])
    runtime_env = yaml.safe_load(Path("jobs/runtime_env.yaml").read_text())
    console.print(f"\n[bold]train[/bold]: a job: {command}", highlight=False, soft_wrap=True)
    client, job = cluster.submit(entry, runtime_env)
    lines: list[str] = []
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[facts]}"), console=console, refresh_per_second=4) as progress:
        bars: dict[str, Any] = {}

        async def follow() -> None:
            rest = ""
            async for text in client.tail_job_logs(job):
                *whole, rest = (rest + text).split("\n")
                for line in whole:
                    lines.append(line)
                    _show(line, progress, bars)

        asyncio.run(follow())
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text("\n".join(lines))
        told = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
        if told and "--restart" in told:
            told += "; or forget all that this demo has made: make demo FRESH=1"
        raise DemoError(told or f"the job {str(status).lower()}; its log is {LOG}")


def _show(line: str, progress: Progress, bars: dict[str, Any]) -> None:
    # Lines of workers arrive with Ray's prefix "(name pid=1) " in front.
    line = re.sub(r"^(\x1b\[\d+m)?\([^)]*pid=[^)]*\)(\x1b\[0m)? ?", "", line)
    if found := parse_line(line):
        if found.name not in bars:
            bars[found.name] = progress.add_task(found.name, total=found.total, facts="")
        progress.update(bars[found.name], completed=found.done, total=found.total, facts=found.facts)
    elif line.startswith(tuple(f"[{name}] " for name in STAGES)):
        progress.console.print("  " + line, highlight=False, markup=False, soft_wrap=True)
        for bar in bars.values():  # its stage is done
            progress.remove_task(bar)
        bars.clear()


def _serve_config(path: Path, release: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    config["applications"][0]["args"]["release"] = str(release)
    port = config["http_options"]["port"]
    if not port_is_free(port):
        raise ConfigError(f"http_options.port: {port}: another program listens on it; end it, or change it in {path}")
    return config


def _wait_ready(client: httpx.Client, cluster: LocalCluster) -> None:
    deadline = time.monotonic() + SERVE_SECONDS
    asked = cluster.serve()
    while time.monotonic() < deadline:
        try:
            if client.get("/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        applications = asked.get_serve_details()["applications"]
        if any(application["status"] == "DEPLOY_FAILED" for application in applications.values()):
            break
        time.sleep(0.5)
    details = asked.get_serve_details()
    message = next((app["message"] for app in details["applications"].values() if app["message"]), "no message")
    raise DemoError(f"serve: the application did not become ready: {' '.join(message.split())[-400:]}")


def _draw_all(client: httpx.Client, console: Console) -> list[Shown]:
    for model in ("auto", "teacher"):  # the first request of a replica pays for what is loaded lazily
        _draw(client, PROMPTS[0], 0, model)
    rows = []
    with Progress(console=console) as progress:
        for seed, prompt in enumerate(progress.track(PROMPTS, description="  images")):
            expert, headers, expert_ms = _draw(client, prompt, seed, "auto")
            teacher, _, teacher_ms = _draw(client, prompt, seed, "teacher")
            code, ratio = headers["x-aptp-code"], float(headers["x-aptp-macs-ratio"])
            rows.append(Shown(prompt, code, ratio, expert_ms, teacher_ms, expert, teacher))
    return rows


def _draw(client: httpx.Client, prompt: str, seed: int, model: str) -> tuple[Image.Image, httpx.Headers, float]:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        answer = client.post("/v1/images/generations", json={"prompt": prompt, "model": model, "seed": seed})
        times.append(1000 * (time.perf_counter() - started))
        if answer.status_code != httpx.codes.OK:
            raise DemoError(f"serve: {answer.status_code} for {prompt!r}: {answer.text[:300]}")
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB")
    return image, answer.headers, statistics.median(times)


def _print_table(console: Console, shown: list[Shown]) -> None:
    table = Table(title="same prompts and seeds, over HTTP, median of 3")
    for name in ("prompt", "code", "MACs ratio", "expert ms", "teacher ms"):
        table.add_column(name, justify="left" if name in ("prompt", "code") else "right")
    for row in shown:
        table.add_row(row.prompt, row.code, f"{row.ratio:.2f}", f"{row.expert_ms:.0f}", f"{row.teacher_ms:.0f}")
    console.print(table)


def _absolute(place: str) -> str:
    return place if "://" in place or place.startswith("package:") else str(Path(place).absolute())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
