"""The README's Python runs as it stands, and its tree names what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_in_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (snippet,) = (each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import openai" not in each)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.fullmatch(r"0\.\d\d of 271 M multiply-adds\n", capsys.readouterr().out)


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    tree = README.partition("## The tree")[2]
    named = re.findall(r"(?m)^(\S+/|cluster\.yaml)\s", tree)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
