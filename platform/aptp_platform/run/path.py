"""The path from captioned images to a release: each stage is run once for what it depends on.

A finished stage with the same fingerprint is reused, and one that was interrupted continues from what its folder holds,
as does a training that gets more steps. One that was made from anything else is refused: what has changed is named, and
a restart of the stage puts what is there aside.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any, Literal

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import places
from aptp_platform.run import layout
from aptp_platform.run.facts import Facts, changes, only_longer
from aptp_platform.run.record import finish_leaving, read_record, remove_stage, set_aside, write_record
from aptp_platform.run.stages import STAGES
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store

Summary = dict[str, Any]
TOLD = 3  # of the changes, in the line that names them


def run_stage(
    name: str,
    config: RunConfig,
    say: Callable[[str], None] = print,
    *,
    restart: Literal["no", "changed", "yes"] = "no",
    known: Facts | None = None,
) -> Summary:
    """Run one stage, or reuse its finished result; returns its summary.

    Args:
        restart: "changed" starts a stage anew that was made from something else; "yes" also one that is finished.
            Either sets aside what is there. An interrupted one that was made from the same goes on.
        known: what the config's stages depend on; given, if several of them are run.

    Raises:
        ConfigError: a stage before it has not been run, or was run for another config; or this one was.
        StoreError: a source is missing or cannot be listed; nothing has been touched then.
        LeaseError: another process works on this run.
    """
    stage, root = STAGES[name], Store.open(config.root, config.storage)
    known = known or Facts(config)
    if getattr(config.reuse, name, None):
        if restart == "yes":
            raise ConfigError(f"reuse.{name}: another run's result is read: restart the stage there, or unset this")
        summary = require_stage(name, config, known)
        say(f"[{name}] reused: {layout.home(config, name).join(stage.folder).uri}, as reuse.{name} says")
        return summary
    expected, facts = known.fingerprint(name), known.of(name)
    for earlier in stage.after:
        require_stage(earlier, config, known)
    with Lease(root, "run") as lease:
        record = read_record(root, name)
        if finish_leaving(root, name, record):
            record = None
        if record is not None:
            goes_on = record["fingerprint"] == expected or only_longer(record.get("facts"), facts)
            if not goes_on and restart == "no":
                raise ConfigError(_refusal(name, root, _changed(name, config, known, record)))
            if not goes_on or (restart == "yes" and "summary" in record):
                place = set_aside(root, name)
                say(f"[{name}] what {root.join(stage.folder).uri} held is in {root.join(place).uri} now")
                record = None
        if record is not None and "summary" in record and record["fingerprint"] == expected:
            say(f"[{name}] reused: {root.join(stage.folder).uri} was made from the same config and inputs")
            return record["summary"]
        write_record(root, name, {"fingerprint": expected, "facts": facts})
        started = time.monotonic()
        module, function = stage.entry.split(":")
        entry = getattr(importlib.import_module(f"aptp_platform.{module}"), function)
        summary = entry(config, known) if "data" in stage.sources else entry(config)
        lease.require()
        seconds = round(time.monotonic() - started, 1)
        done = {"fingerprint": expected, "facts": facts, "seconds": seconds, "summary": summary}
        write_record(root, name, done)
    say(f"[{name}] done in {seconds:.0f} s: {_brief(summary)}")
    return summary


def require_stage(name: str, config: RunConfig, known: Facts | None = None) -> Summary:
    """The summary of a finished stage, if it was made from this config."""
    known, record = known or Facts(config), finished(name, config)
    if record["fingerprint"] != known.fingerprint(name):
        told = _told(_changed(name, config, known, record))
        raise ConfigError(
            f"{name}: its result in {layout.home(config, name).uri} was made from another config or other inputs "
            f"({told}): set that back, give this run a root of its own, or run the {name} job with --restart {name}"
        )
    return record["summary"]


def finished(name: str, config: RunConfig) -> dict[str, Any]:
    """The record of a finished stage, whatever it was made from.

    Raises:
        ConfigError: it is not finished.
    """
    root = layout.home(config, name)
    record = read_record(root, name)
    if record is None or "summary" not in record:
        raise ConfigError(f"{name}: {root.uri} holds no finished result of it; run the {name} job first")
    return record


def reach_places(config: RunConfig) -> None:
    """Check that every bucket the run needs answers, before the run waits or pays for anything else.

    Raises:
        ConfigError: one does not answer, or refuses; the field that names it is in the line.
    """
    for field, place in places(config).items():
        try:
            Store.open(place, config.storage).reach()
        except StoreError as error:
            raise ConfigError(f"{field}: {error}") from None


def forget(config: RunConfig) -> None:
    """Remove what every stage of this run has made, and the record of it."""
    root = Store.open(config.root, config.storage)
    for stage in STAGES:
        remove_stage(root, stage)


def _changed(name: str, config: RunConfig, known: Facts, record: dict[str, Any]) -> list[str]:
    """What is not as it was when a stage was made, the stages before it included."""
    before, now = record.get("facts"), known.of(name)
    told = changes(before, now)
    if before is None:
        return told
    for earlier, expected in now["after"].items():
        if before["after"].get(earlier) == expected:
            continue
        there = read_record(layout.home(config, earlier), earlier)
        if there is None or there.get("fingerprint") == expected:
            told.append(f"{earlier} was made anew")
        else:
            told += _changed(earlier, config, known, there)
    return list(dict.fromkeys(told))


def _told(changed: list[str]) -> str:
    more = f"; and {len(changed) - TOLD} more" if len(changed) > TOLD else ""
    return "; ".join(changed[:TOLD]) + more


def _refusal(name: str, root: Store, changed: list[str]) -> str:
    return (
        f"{name}: what {root.join(STAGES[name].folder).uri} holds was made from another config or other inputs "
        f"({_told(changed)}): set that back, give this run a root of its own, or start the stage anew with "
        f"--restart {name}, which keeps what is there in {root.join(layout.ASIDE).uri}"
    )


def _brief(summary: Summary) -> str:
    return ", ".join(f"{key} {value}" for key, value in summary.items() if isinstance(value, (int, float, str)))
