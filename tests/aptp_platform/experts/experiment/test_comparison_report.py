"""The comparison's page: its sentences follow the numbers, whoever wins, and it stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from aptp_platform.experts.evidence.arms import ROUTED, TEACHER
from aptp_platform.experts.evidence.sentences import (
    arms_sentence,
    curves_sentence,
    gap_sentence,
    need_sentence,
    quality_sentence,
    verdict,
)
from aptp_platform.experts.evidence.trials import ArmRun
from aptp_platform.experts.experiment.comparison import compare
from aptp_platform.experts.experiment.comparison_report import write
from tests.support.made_up_scores import made_up_scores, with_images

COSTS = (0.3, 0.5)
CURVES = {"routed": [{"step": 100.0, "extra_loss": 0.2}, {"step": 200.0, "extra_loss": 0.1}]}


class Page(HTMLParser):
    """What a browser would show: words, and pictures with what stands for them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.images = "", list[dict[str, str | None]]()
        self.feed(re.sub("<style>.*?</style>", "", path.read_text(), flags=re.DOTALL))

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))


def runs(ours: float, theirs: float, seed: int = 0, images: bool = True) -> list[ArmRun]:
    method = made_up_scores(COSTS, ours, seed=seed)
    one = made_up_scores((0.4,), theirs, seed=seed, singles={"uniform": 0.3})
    if images:
        method = with_images(method, (TEACHER, ROUTED))
        one = with_images(one, (TEACHER, ROUTED, "uniform"))
    return [ArmRun(ROUTED, method), ArmRun("one_code", one)]


@pytest.mark.parametrize(
    ("ours", "theirs", "word", "times"),
    [(0.05, 0.1, "surely less", "0.50"), (0.1, 0.05, "surely more", "2.00"), (0.1, 0.1, "not surely", "1.00")],
)
def test_the_verdict_follows_the_numbers(ours: float, theirs: float, word: str, times: str) -> None:
    facts = compare(runs(ours, theirs, images=False))["budgets"]["0.4"]
    line = verdict("0.4", facts)
    assert "the strongest opponent, one code, loses" in line
    assert f"Routed experts lose {word}" in line
    assert float(times) == pytest.approx(float(re.findall(r": (\d\.\d\d) times", line)[0]), abs=0.02)
    assert re.search(rf"{word.removeprefix('surely ')}[^;]* one code", arms_sentence(facts["routed_minus"]))
    wins, losses = int(word == "surely less"), int(word == "surely more")
    expected = f"one code.* surely less at {wins} and surely more at {losses} of 1"
    assert re.search(expected, quality_sentence({"0.4": facts}))


def test_sentences_without_an_answer_say_so() -> None:
    alone = compare(runs(0.1, 0.1)[:1])["budgets"]["0.4"]
    assert verdict("0.4", alone).endswith("they have no opponent at this budget.")
    assert "not sure" in gap_sentence(alone["oracle_gap"])
    gap = {"mean": 0.1, "95": [0.05, 0.15]}
    sure = {"random_minus_oracle": gap, "routed_minus_oracle": gap, "closed": -0.5, "closed_95": None}
    assert gap_sentence(sure).endswith("it closes -50% of that gap.")
    assert "no rank correlation" in need_sentence({"spearman": None, "95": None})
    for interval, word in (([0.1, 0.3], "follows"), ([-0.3, -0.1], "runs against"), ([-0.1, 0.3], "not surely")):
        assert word in need_sentence({"spearman": 0.1, "95": interval})
    assert "ends at 0.1000 after 200 steps (-50% since step 100)" in curves_sentence(CURVES)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    given = [run for seed in (0, 1) for run in runs(0.05, 0.1, seed)]
    found = compare(given)
    write(tmp_path, found, given, curves=CURVES)
    page = Page(tmp_path / "report.html")
    figures = {"arms-0.4", "need-0.4", "budgets", "curves", "milliseconds", "kept"}
    assert {path.stem for path in tmp_path.glob("*.png")} == figures
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert all(len(str(image["alt"])) > 10 for image in page.images), "each picture is told in words"
    hardest, side_by_side, columns, examples = 8, 16, 4, 10
    assert len(page.images) == len(figures) + (hardest + side_by_side) * columns + examples
    assert "{" not in page.words, "nothing is shown as raw data"
    assert "nan" not in page.words.split()
    assert "one code: one network for all prompts" in page.words
    assert "With fewer than 5 seeds they are too narrow" in page.words
    assert "A Frechet distance needs 512 generated images" in page.words
    assert not re.search(r"<(script|link)|https?://", (tmp_path / "report.html").read_text())


def test_a_page_without_images(tmp_path: Path) -> None:
    given = runs(0.05, 0.1, images=False)
    write(tmp_path, compare(given), given)
    page = Page(tmp_path / "report.html")
    assert len(page.images) == 4
    assert "Of all prompts, those whose routed expert loses most" in page.words
    assert "With one seed they do not cover" in page.words
