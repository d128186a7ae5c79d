"""What operators look back with: the drift of recent routes, and a decision log replayed against another release."""

import math
from pathlib import Path

import pytest

from aptp.release import Release
from aptp.router import Router
from aptp_platform.serve.args import DecisionArgs
from aptp_platform.serve.messages import Choice, GenerationRequest
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.routing.decision_log import DecisionLog
from aptp_platform.serve.routing.drift import DriftMonitor, js_distance
from aptp_platform.serve.routing.prompt_cache import score_prompts
from aptp_platform.serve.routing.replay import replay
from aptp_platform.serve.routing.selection import Situation, choose
from tests.support.tiny_release import ANCHORS, build_release

PROMPTS = (*ANCHORS, "zzz qqq 17 %%%", "red", "a very tall tower", "the sea", "cat cat cat", "")


def test_drift_is_none_at_the_training_shares_and_all_where_nothing_is_shared() -> None:
    assert js_distance([0.5, 0.5], [0.5, 0.5]) == 0
    assert js_distance([1, 0], [0, 1]) == 1
    nearly = [0.1 + 1e-10, 0.2 - 1e-10, 0.3 + 1e-10, 0.4 - 1e-10]
    assert js_distance([0.1, 0.2, 0.3, 0.4], nearly) == pytest.approx(0, abs=1e-7), "rounding gives no NaN"
    assert js_distance([1, 0], [0.5, 0.5]) == pytest.approx(
        math.sqrt((math.log2(1 / 0.75) + 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)) / 2)
    )


def test_only_the_window_counts_and_a_few_routes_say_nothing() -> None:
    monitor = DriftMonitor([3, 1], window=40)
    told = [monitor.observe(1, unknown=True) for _ in range(40)]
    assert (told[2].distance, told[2].unknown_rate) == (0, 0)
    assert told[-1].distance > 0.5
    assert told[-1].unknown_rate == 1
    settled = [monitor.observe(int(index % 4 == 0), unknown=False) for index in range(40)][-1]
    assert settled.distance == pytest.approx(0, abs=1e-6)
    assert settled.unknown_rate == 0


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Release]:
    folder = tmp_path_factory.mktemp("replay")
    first, second = (build_release(folder / str(seed), num_codes=2, with_teacher=False, seed=seed) for seed in (0, 1))
    return first, second


def write_log(folder: Path, release: Release, *, plain: bool, price: float | None = None) -> list[Choice]:
    """The log of a server of this release that was asked for PROMPTS, and its choices."""
    catalog = ReleaseSource(str(release.path)).catalog(with_teacher=False)
    idle = Situation(catalog, dict.fromkeys((model.name for model in catalog.models), 1))
    log = DecisionLog(DecisionArgs(folder=str(folder), prompts="plain" if plain else "hashed"), catalog)
    choices = []
    scored = score_prompts(Router.load(release.router_path), PROMPTS, catalog.familiar)
    for prompt, scores in zip(PROMPTS, scored, strict=True):
        request = GenerationRequest(prompt, (1, 2), 4, 7.5, (16, 16), price=price)
        choices.append(choose(request, scores, idle))
        log.write(request, choices[-1], "ok", 0.1)
    return choices


def test_against_its_own_release_a_log_changes_nothing(releases: tuple[Release, Release], tmp_path: Path) -> None:
    choices = write_log(tmp_path, releases[0], plain=True)
    told = replay([tmp_path], ReleaseSource(str(releases[0].path)))
    assert (told.replayed, told.changed, told.hashed, told.broken) == (len(PROMPTS), 0, 0, 0)
    assert told.macs_before == told.macs_after == sum(choice.macs * 4 * 2 for choice in choices)
    assert told.unknown_before == told.unknown_after == sum(bool(choice.unknown) for choice in choices)
    assert 0 < told.unknown_after < len(PROMPTS), "the anchors are familiar, not everything is"


def test_a_price_is_replayed_and_a_log_without_one_is_read(tmp_path: Path) -> None:
    release = build_release(tmp_path / "release", num_codes=2, with_teacher=False, routing="need")
    choices = write_log(tmp_path / "log", release, plain=True, price=0.0)
    assert {choice.reason for choice in choices} == {"price"}
    told = replay([tmp_path / "log"], ReleaseSource(str(release.path)))
    assert told.macs_before == told.macs_after == sum(choice.macs * 4 * 2 for choice in choices)

    (file,) = (tmp_path / "log").iterdir()
    file.write_text(file.read_text().replace('"price": 0.0, ', ""))
    older = replay([file], ReleaseSource(str(release.path)))
    assert (older.replayed, older.broken) == (len(PROMPTS), 0)
    assert older.macs_after < older.macs_before, "at the release's own price some take the cheaper code"


def test_against_another_release_it_says_who_goes_elsewhere(releases: tuple[Release, Release], tmp_path: Path) -> None:
    then, now = (write_log(tmp_path / str(index), release, plain=True) for index, release in enumerate(releases))
    told = replay([tmp_path / "0"], ReleaseSource(str(releases[1].path)))
    moved = [(first.routed, second.routed) for first, second in zip(then, now, strict=True)]
    assert told.changed == sum(first != second for first, second in moved) > 0
    assert told.macs_after == sum(choice.macs * 4 * 2 for choice in now)
    assert f"another code: {told.changed} " in "\n".join(told.lines())


def test_hashed_prompts_take_part_when_they_are_known_and_broken_lines_are_counted(
    releases: tuple[Release, Release], tmp_path: Path
) -> None:
    write_log(tmp_path, releases[0], plain=False)
    (file,) = tmp_path.iterdir()
    assert not any(prompt in file.read_text() for prompt in PROMPTS[:4])
    with file.open("a") as stream:
        stream.write('{"outcome": "ok", "prompt": "of another program"}\n[]\n{"time": 17')
    told = replay([file], ReleaseSource(str(releases[0].path)), PROMPTS[:3])
    assert (told.replayed, told.hashed, told.broken, told.changed) == (3, len(PROMPTS) - 3, 3, 0)
    with pytest.raises(ValueError, match="no decisions there"):
        replay([tmp_path / "nowhere"], ReleaseSource(str(releases[0].path)))
