"""What a run knows of its stages: a record of each beside the folders, and what was set aside.

    stages/prune.json   the fingerprint of what the stage depends on, those facts, and its summary once it is done
    aside/prune-1/      what a restart put aside: the record as `stage.json`, and the folder

A record is outside its stage's own folder, because a release lists every file in its folder. Nothing here removes what
a stage has made but the last two functions, for which there is a command of its own.
"""

from dataclasses import dataclass
from typing import Any

from aptp_platform.run import layout
from aptp_platform.run.stages import STAGES
from aptp_platform.storage.store import Store

_LEAVING = "leaving"  # in a record: where its stage is being put aside


@dataclass(frozen=True)
class Held:
    """What is in one folder: of a stage, or of what was set aside."""

    name: str  # below the run's root
    files: int
    bytes: int
    finished: bool


def read_record(root: Store, name: str) -> dict[str, Any] | None:
    """A stage's record; None if it has not been started."""
    return root.read_json(_file(name)) if root.exists(_file(name)) else None


def write_record(root: Store, name: str, record: dict[str, Any]) -> None:
    root.write_json(_file(name), record)


def set_aside(root: Store, name: str) -> str:
    """Put a stage's folder and its record aside; returns where they are now. One that is interrupted is finished by
    `finish_leaving`."""
    target = _free(root, name)
    root.write_json(f"{target}/stage.json", read_record(root, name))
    write_record(root, name, {_LEAVING: target})
    finish_leaving(root, name, {_LEAVING: target})
    return target


def finish_leaving(root: Store, name: str, record: dict[str, Any] | None) -> bool:
    """Finish putting a stage aside, if its record says that it is on its way; whether it was."""
    if record is None or _LEAVING not in record:
        return False
    folder = STAGES[name].folder
    if root.exists(folder):
        root.move(folder, f"{record[_LEAVING]}/{folder}", keep=True)
    root.remove(_file(name))
    return True


def put_aside(root: Store, folder: str) -> str:
    """Put a folder aside that no record tells of; returns where it is now."""
    target = _free(root, folder)
    root.move(folder, target)
    return target


def _free(root: Store, name: str) -> str:
    number = 1
    while root.exists(target := f"{layout.ASIDE}/{name}-{number}"):
        number += 1
    return target


def held_by(root: Store, name: str) -> list[Held]:
    """The folder of a stage, and those set aside of it, as far as they are there."""
    stage, record = STAGES[name], read_record(root, name)
    found = [_held(root, stage.folder, record is not None and "summary" in record)]
    asides = {place.split("/")[0] for place in root.join(layout.ASIDE).list("*/stage.json")}
    for place in sorted(asides):
        if place.rpartition("-")[0] == name:
            before = root.read_json(f"{layout.ASIDE}/{place}/stage.json")
            found.append(_held(root, f"{layout.ASIDE}/{place}", before is not None and "summary" in before))
    return [each for each in found if each.files]


def remove_stage(root: Store, name: str) -> None:
    """Remove what a stage has made, and its record. What was set aside stays."""
    root.remove(_file(name))
    root.remove(STAGES[name].folder)


def remove_held(root: Store, name: str, held: Held) -> None:
    """Remove one of the things that `held_by` found of a stage."""
    if held.name == STAGES[name].folder:
        remove_stage(root, name)
    else:
        root.remove(held.name)


def _held(root: Store, name: str, finished: bool) -> Held:
    files = root.join(name).files("**")
    return Held(name, len(files), sum(info.size for info in files.values()), finished)


def _file(name: str) -> str:
    return f"{layout.RECORDS}/{name}.json"
