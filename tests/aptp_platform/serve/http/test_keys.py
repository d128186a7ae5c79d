"""API keys: known by their hashes, limited in multiply-adds, off on loopback; the secret is in no error and no log."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from aptp_platform.serve.args import KeyArgs
from aptp_platform.serve.http.keys import ApiKey, ApiKeyAuth, make_key, read_keys
from aptp_platform.serve.http.limits import MacsBucket
from aptp_platform.serve.messages import ApiError
from tests.support.cheap_server import CheapGateway, answers, door

IMAGE = {"prompt": "a cat", "num_inference_steps": 10, "guidance_scale": 0}  # ten passes: 5e9 of code-00


def ask(keeper: ApiKeyAuth, *calls: tuple[str, str, Any], gateway: Any = None) -> list[httpx.Response]:
    """Answers to (path, key, body); a body of None is a GET."""

    def sent(path: str, key: str, body: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return {"method": "GET" if body is None else "POST", "url": path, "headers": headers, "json": body}

    told: list[httpx.Response] = answers(*(sent(*call) for call in calls), keeper=keeper, gateway=gateway)
    return told


def admitted(keeper: ApiKeyAuth, authorization: str | None) -> ApiKey | None:
    return asyncio.run(keeper.admit(authorization))


def test_a_bucket_lets_in_at_its_rate_and_never_starves_a_large_order() -> None:
    now = 0.0
    bucket = MacsBucket(rate=10, burst=100, clock=lambda: now)
    assert bucket.take(250) == 0, "anything is left, so the request is charged whole"
    assert bucket.take(1) == pytest.approx(15), "the seconds until the level is above zero"
    now = 15.5
    assert bucket.take(5) == 0
    now = 1000.0
    assert bucket.level() == 100, "never more than the burst"
    assert bucket.level(share=0.25) == 25, "of four replicas each lets a quarter in"


def test_keys_are_off_on_loopback_and_demanded_elsewhere() -> None:
    assert admitted(door(KeyArgs(), loopback=True), None) is None
    with pytest.raises(ValueError, match=r"no API keys: put .* into keys\.file or .*APTP_API_KEYS"):
        door(KeyArgs())
    assert admitted(door(KeyArgs(required=False)), None) is None
    with pytest.raises(ValueError, match="no API keys"):
        door(KeyArgs(required=True), loopback=True)


def test_only_a_known_key_is_listened_to_and_probes_need_none() -> None:
    token, entry = make_key("web")
    stranger, _ = make_key("web")
    keeper = door(KeyArgs(), [entry])
    image = "/v1/images/generations"
    known, *others = ask(keeper, (image, token, IMAGE), (image, stranger, IMAGE), (image, "", IMAGE), (image, "", {}))
    assert known.status_code == 200
    assert "x-ratelimit-limit-macs" not in known.headers, "a key without a limit"
    for answer in others:
        error = answer.json()["error"]
        assert answer.status_code == 401
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
        assert answer.headers["x-should-retry"] == "false"
        assert stranger not in answer.text
    closed = ask(keeper, ("/v1/models", "", None), ("/v1/route", "", {"prompt": "a"}))
    assert [answer.status_code for answer in closed] == [401, 401]
    assert [answer.status_code for answer in ask(keeper, ("/health", "", None), ("/", "", None))] == [200, 200]


def test_wrong_keys_are_answered_slowly_and_a_right_one_does_not_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptp_platform.serve.http.limits._WRONG_KEYS_PER_S", 50.0)
    token, entry = make_key("web")
    keeper = door(KeyArgs(), [entry])

    async def main() -> tuple[list[Any], float, float]:
        started = time.monotonic()
        wrong = [asyncio.ensure_future(keeper.admit(f"Bearer {index}")) for index in range(100)]
        await asyncio.sleep(0.01)
        assert await keeper.admit(f"Bearer {token}") == entry
        right_s = time.monotonic() - started
        errors = await asyncio.gather(*wrong, return_exceptions=True)
        return errors, right_s, time.monotonic() - started

    errors, right_s, wrong_s = asyncio.run(main())
    statuses = [error.status for error in errors]
    assert (statuses.count(401), statuses.count(429)) == (10 + 64, 26), "ten at once, then as many as may wait"
    assert right_s < 0.5 < wrong_s


def test_a_limit_counts_the_multiply_adds_of_the_chosen_model() -> None:
    token, entry = make_key("web", macs_per_second=1e3)
    entry = entry.model_copy(update={"burst_macs": 12e9})
    other, free = make_key("other")
    image = ("/v1/images/generations", token, IMAGE)
    keeper = door(KeyArgs(), [entry, free])
    first, streamed, third, fourth, unlimited = ask(
        keeper, image, (*image[:2], IMAGE | {"stream": True}), image, image, (image[0], other, IMAGE)
    )
    left = [float(answer.headers["x-ratelimit-remaining-macs"]) for answer in (first, streamed, third)]
    assert left == pytest.approx([7e9, 2e9, 0], abs=1e5), "5e9 each, the teacher's 1e10 only while the choice is open"
    assert [answer.status_code for answer in (first, streamed, third, fourth)] == [200, 200, 200, 429]
    assert fourth.json()["error"]["code"] == "rate_limit_exceeded"
    assert float(fourth.headers["retry-after"]) == pytest.approx(3e6, rel=0.01), "3e9 above the limit, 1e3 a second"
    assert unlimited.status_code == 200, "another key's limit is its own"


def test_a_decision_without_an_image_is_charged_too() -> None:
    token, entry = make_key("web", macs_per_second=1e3)
    keeper = door(KeyArgs(), [entry.model_copy(update={"burst_macs": 8e8})])
    asked = ("/v1/route", token, {"prompt": "a cat"})
    assert [answer.status_code for answer in ask(keeper, asked, asked, asked)] == [200, 200, 429], "5e8 each"


@pytest.mark.parametrize(("status", "free"), [(503, True), (429, True), (504, False)])
def test_a_request_that_is_refused_costs_nothing_unless_it_was_tried(status: int, free: bool) -> None:
    token, entry = make_key("web", macs_per_second=1e3)
    keeper, gateway = door(KeyArgs(), [entry]), CheapGateway()
    gateway.refuses = status
    (answer,) = ask(keeper, ("/v1/images/generations", token, IMAGE), gateway=gateway)
    assert answer.status_code == status
    assert (answer.headers["x-ratelimit-remaining-macs"] == answer.headers["x-ratelimit-limit-macs"]) == free


def test_a_changed_file_counts_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aptp_platform.serve.http.keys._RELOAD_S", 0.0)
    file = tmp_path / "keys.json"
    (old, old_entry), (new, new_entry) = make_key("old"), make_key("new")
    file.write_text(json.dumps([old_entry.model_dump()]))
    keeper = door(KeyArgs(file=str(file)))
    assert admitted(keeper, f"Bearer {old}") == old_entry
    file.write_text(json.dumps([new_entry.model_dump()]))
    assert admitted(keeper, f"Bearer {new}") == new_entry
    with pytest.raises(ApiError):
        admitted(keeper, f"Bearer {old}")
    file.write_text(f'[{{"name": "x", "sha256": "{new}"}}]')
    assert admitted(keeper, f"Bearer {new}") == new_entry
    assert "were not read again" in caplog.text
    assert new not in caplog.text, "a key that was put where its hash belongs is not echoed"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1 is not JSON"),
        ("{}", "list"),
        ('[{"name": "a b", "sha256": "x"}]', r"0\.name"),
        ('[{"name": "a", "sha256": "my-secret-key"}]', r"0\.sha256"),
        (f'[{{"name": "a", "sha256": "{"0" * 64}", "macs": 3}}]', r"0\.macs"),
        (f'[{{"name": "a", "sha256": "{"0" * 64}", "macs_per_second": 0}}]', r"0\.macs_per_second"),
        (f'[{{"name": "a", "sha256": "{"0" * 64}"}}, {{"name": "a", "sha256": "{"1" * 64}"}}]', "one name"),
    ],
)
def test_a_wrong_secret_is_refused_by_field_and_not_quoted(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        read_keys(text, "APTP_API_KEYS")
    assert "my-secret-key" not in str(caught.value)
