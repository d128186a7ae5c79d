"""docs/your-data.md names every format, and its scripts make files that the readers accept."""

import re
from pathlib import Path

import pytest

from aptp_platform.data.captions import FORMATS, read_file
from aptp_platform.data.formats import listing, parquet, tar
from aptp_platform.data.sample import CaptionedImage
from aptp_platform.storage.store import Store

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your-data.md").read_text()


def test_what_the_scripts_of_the_page_write_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    scripts = [script for script in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "quarantine" not in script]
    for script in scripts:
        exec(compile(script, "your-data.md", "exec"), {})
    store = Store.open("runs/my-data")
    captions = [path.read_text() for path in sorted((tmp_path / "runs/my-data/images").glob("*.txt"))]
    for name in (
        "shards/train-00.tar.gz", "parquet/train-00.parquet", "metadata.jsonl", "train.tsv",
        "coco/annotations/captions_train2017.json",
    ):  # fmt: skip
        rows = list(read_file(store, name))
        assert [row.captions[0] for row in rows if isinstance(row, CaptionedImage)] == captions, name


def test_the_page_names_every_ending_and_every_name_that_the_readers_know() -> None:
    names = (*FORMATS, *listing.FILE_NAMES, *listing.CAPTION_NAMES, *parquet.IMAGE_COLUMNS, *parquet.CAPTION_COLUMNS)
    known = {*names, *parquet.KEY_COLUMNS, *tar.IMAGE_EXTENSIONS}
    assert known <= set(re.findall(r"`([^`\n]+)`", PAGE))
