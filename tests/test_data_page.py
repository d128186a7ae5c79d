"""docs/your-data.md names every format, and its scripts make files that the readers accept."""

import re
import subprocess
from pathlib import Path

import pytest

from aptp_platform.data.captions import FORMATS, read_file
from aptp_platform.data.formats import listing, parquet, tar
from aptp_platform.data.sample import CaptionedImage, Fault
from aptp_platform.storage.store import Store

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your-data.md").read_text()


def test_what_the_scripts_of_the_page_write_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs/my-data").mkdir(parents=True)
    (tmp_path / "runs/my-data/Train_GCC-training.tsv").write_text("a cat\thttps://host.invalid/cat.jpg\n")
    for language, script in re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL):
        if language == "sh":
            subprocess.run(["sh", "-ec", script], check=True)
        elif "quarantine" not in script:
            exec(compile(script, "your-data.md", "exec"), {})
    store = Store.open("runs/my-data")
    captions = [path.read_text() for path in sorted((tmp_path / "runs/my-data/images").glob("*.txt"))]
    for name in (
        "shards/train-00.tar.gz", "shards/train-01.tar", "shards/train-02.tgz", "parquet/train-00.parquet",
        "metadata.jsonl", "train.tsv", "coco/annotations/captions_train2017.json",
    ):  # fmt: skip
        rows = list(read_file(store, name))
        assert [row.captions[0] for row in rows if isinstance(row, CaptionedImage)] == captions, name
    (row,) = read_file(store, "cc3m.tsv")
    assert (row.key, isinstance(row, Fault)) == ("cc3m/0", True), "its image was not downloaded"


def test_the_page_names_every_ending_and_every_name_that_the_readers_know() -> None:
    names = (*FORMATS, *listing.FILE_NAMES, *listing.CAPTION_NAMES, *parquet.IMAGE_COLUMNS, *parquet.CAPTION_COLUMNS)
    known = {*names, *parquet.KEY_COLUMNS, *tar.IMAGE_EXTENSIONS}
    assert known <= set(re.findall(r"`([^`\n]+)`", PAGE))
