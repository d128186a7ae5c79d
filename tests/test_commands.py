"""The commands that pages and docstrings tell a reader to type: what each names exists, and each would start."""

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aptp_platform.config_file import load_config
from aptp_platform.run.job import require_lasting
from aptp_platform.serve.args import ServeArgs

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
SCRIPTS = [path for folder in ("jobs", "benchmarks", "examples", "platform") for path in ROOT.glob(f"{folder}/**/*.py")]
SETTINGS = [ROOT / "cluster.yaml", *ROOT.glob("serve_configs/*.yaml"), *ROOT.glob("jobs/**/*.yaml")]
STARTS = re.compile(r"(\w+=\S+ )*(\S*/)?(python3?|ray job submit|serve deploy|make|torchrun) [\w./-]")
JOB_COPY = Path("/tmp/ray/session/runtime_resources/working_dir_files/copy")


def commands() -> Iterator[tuple[str, str]]:
    """Where each stands, and the command on one line."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"(?ms)^```(?:bash|sh)?\n(.*?)^```", text)
        spans = re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        yield from ((page.name, line) for line in [*lines, *(" ".join(span.split()) for span in spans)])
    for script in SCRIPTS:
        words = ast.get_docstring(ast.parse(script.read_text())) or ""
        yield from ((script.name, line.strip()) for line in words.replace("\\\n", " ").splitlines())
        yield from ((script.name, span) for span in re.findall(r"`([^`]+)`", words))
    for settings in SETTINGS:
        comments = re.findall(r"(?m)#\s*(.*)$", settings.read_text())
        yield from ((settings.name, part.strip("`")) for line in comments for part in [line, *line.split("`")])


SYNOPSIS = re.compile(r"[\[<]|\.\.\.")  # it describes a command, nobody types it
FOUND = sorted({(where, line) for where, line in commands() if STARTS.match(line) and not SYNOPSIS.search(line)})


@pytest.mark.parametrize(("where", "line"), FOUND, ids=[f"{where}: {line[:60]}" for where, line in FOUND])
def test_a_command_would_start(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.split(r"  +\(| \| ", line)[0], comments=True)
    if words[0] == "make":
        assert re.search(rf"(?m)^{words[1]}:", Path("Makefile").read_text())
        return
    for word in words:
        path = word.partition("=")[0] if "/" in word.partition("=")[0] else ""
        if (ROOT / path.partition("/")[0]).is_dir() and path.partition("/")[0] not in ("", "runs", ".venv"):
            assert Path(path).exists(), f"{path} does not exist"
    if words[:2] == ["serve", "deploy"]:
        for application in yaml.safe_load(Path(words[2]).read_text())["applications"]:
            ServeArgs.model_validate(application["args"])
        return
    source, options = _script(words)
    assert [option for option in options if f'"{option}"' not in source] == [], "the script knows no such option"
    if "--config" in words:
        given = [word for before, word in itertools.pairwise(words) if before == "--set"]
        config = load_config(words[words.index("--config") + 1], given)
        if words[:3] == ["ray", "job", "submit"]:
            require_lasting(config, JOB_COPY)


def _script(words: list[str]) -> tuple[str, list[str]]:
    """The source of what a command runs, with that of what parses every job's options, and the options it is given."""
    for at, (before, word) in enumerate(itertools.pairwise(["", *words])):
        named = [word] if word.endswith(".py") else []
        if before == "-m":
            ends = (".py", "/__main__.py")
            named = [f"{folder}{word.replace('.', '/')}{end}" for folder in ("", "platform/") for end in ends]
        if (before, word) == ("-m", "pytest"):
            return "", []
        if found := next((Path(each) for each in named if Path(each).exists()), None):
            job = Path("platform/aptp_platform/run/job.py").read_text()
            return found.read_text() + job, [option for option in words[at + 1 :] if option.startswith("--")]
    raise AssertionError("it names no script that exists")


def test_every_kind_of_command_is_found() -> None:
    """An expression that finds nothing would pass everything."""
    assert len(FOUND) > 30
    starts = {" ".join(line.split()[:2]) for _, line in FOUND}
    assert {"ray job", "serve deploy", "make demo", "python jobs/fill_bucket.py", ".venv/bin/python -m"} <= starts
    assert {where for where, _ in FOUND} >= {"README.md", "operations.md", "encode_latents.py", "experts.yaml"}
