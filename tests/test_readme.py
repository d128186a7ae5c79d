"""The README's Python runs as it stands; its figure, its tree and the pages' links name what is there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from aptp_platform.config_file import load_config
from aptp_platform.run.stages import STAGES
from aptp_platform.serve.args import ServeArgs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WALK = (ROOT / "docs/getting-started.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]


def test_the_python_in_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (snippet,) = (each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import openai" not in each)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.fullmatch(r"0\.\d\d of 271 M multiply-adds\n", capsys.readouterr().out)


def test_the_figure_in_the_readme_shows_the_stages_in_their_order() -> None:
    steps = re.findall(r"(?m)^  -> (\w+) .*? (\w+)\.py", README)
    assert steps == [(stage.name, stage.script) for stage in STAGES.values()]


def test_the_jobs_of_the_walk_are_the_stages_in_their_order() -> None:
    """They are typed as they stand; what they would read exists and is legal. `test_path.py` runs what they call."""
    lines = [shlex.split(line) for line in WALK.splitlines() if line.startswith("ray job submit")]
    stages = []
    for line in lines:
        *submit, python, script, flag, config = line
        assert submit == ["ray", "job", "submit", "--runtime-env", "jobs/runtime_env.yaml", "--"]
        assert (python, flag) == ("python", "--config")
        (stage,) = re.findall(r'run_(?:job|stage)\("(\w+)"', (ROOT / script).read_text())
        assert script == f"jobs/{STAGES[stage].script}.py"
        stages.append(stage)
        assert load_config(ROOT / config).root == "s3://aptp/run"
    assert stages == list(STAGES)
    assert yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["working_dir"] == "."
    serve = yaml.safe_load((ROOT / "serve_configs" / "bucket.yaml").read_text())
    args = ServeArgs.model_validate(serve["applications"][0]["args"])
    assert args.release == f"{load_config(ROOT / config).root}/{STAGES['publish'].folder}"


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    tree = README.partition("## The tree")[2]
    named = re.findall(r"(?m)^(\S+/|cluster\.yaml)\s", tree)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in map(anchor, re.findall(r"(?m)^#+ (.*)$", target.read_text())), link
