"""What docs/algorithm.md names exists: files, tests, options; and no fault of the list is without a test."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from aptp import FinetuningConfig, PruningConfig, RouterConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/algorithm.md").read_text()
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
}


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = PAGE.partition(heading)[2].partition("| --- |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[1:]]


def test_every_file_and_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 60
    assert named <= TESTS
    files = set(re.findall(r"`((?:aptp|tests)/[\w/]+\.py)`", PAGE))
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "aptp").glob("*.py")} - files == {
        "aptp/__init__.py",
        "aptp/cli.py",
        "aptp/latents.py",
        "aptp/prompts.py",
    }
    assert all((ROOT / file).is_file() for file in files)


def test_every_fault_has_its_test() -> None:
    faults = rows_below("## Faults of the authors' code")
    assert [row[0] for row in faults] == [str(number) for number in range(1, 37)]
    assert all(re.findall(r"`(test_\w+)`", row[3]) for row in faults)


def test_the_options_that_differ_are_options_and_what_paper_sets_is_listed() -> None:
    listed = {name for row in rows_below("## Where we differ, and why") for name in re.findall(r"`(\w+)`", row[0])}
    configs: tuple[Any, ...] = (RouterConfig(), PruningConfig(), FinetuningConfig())
    known = {field.name for config in configs for field in fields(config)} | {"depth_order", "read_space"}
    assert listed <= known
    papers = (RouterConfig.paper(), PruningConfig.paper(), FinetuningConfig.paper())
    for ours, paper in zip(configs, papers, strict=True):
        differing = {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(paper, f.name)}
        assert differing <= listed
