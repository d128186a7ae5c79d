"""The order of the rows: an epoch is a permutation, a later start is a suffix, ranks share each batch out."""

from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aptp_platform.config import ConfigError
from aptp_platform.data.encoded import encoded_table, latent_size, write_table
from aptp_platform.storage.errors import DamagedError
from aptp_platform.storage.store import Store
from aptp_platform.train.stream import Stream, files_by_code, files_of

ROWS, PARTS, CAPTIONS = 7, 3, 2


@pytest.fixture
def encoded(tmp_path: Path) -> Store:
    """Three files of seven rows; a row's latents, and its captions' embeddings, tell which it is."""
    store = Store.open(tmp_path / "encoded")
    for part in range(PARTS):
        numbers = [part * ROWS + row for row in range(ROWS)]
        table = encoded_table(
            numbers,
            [f"key{number}" for number in numbers],
            np.stack([np.full((4, 2, 2), number, np.float16) for number in numbers]),
            [[f"{number}/{caption}" for caption in range(CAPTIONS)] for number in numbers],
            [np.array([[number, caption] for caption in range(CAPTIONS)], np.float16) for number in numbers],
            ["{}"] * ROWS,
        )
        write_table(store, f"part-{part:05d}.parquet", table)
    return store


@pytest.fixture
def assigned(tmp_path: Path) -> Store:
    """Caption c of row n belongs to code (n + c) modulo 3."""
    store = Store.open(tmp_path / "assigned")
    for part in range(PARTS):
        numbers = [part * ROWS + row for row in range(ROWS)]
        codes = [[(number + caption) % 3 for caption in range(CAPTIONS)] for number in numbers]
        write_table(store, f"part-{part:05d}.parquet", pa.table({"key": [f"key{n}" for n in numbers], "codes": codes}))
    return store


def captions_of(stream: Stream, start: int, stop: int, rank: int = 0, ranks: int = 1, size: int = 3) -> list[list[str]]:
    batches = list(stream.batches(size, start, stop, rank, ranks))
    for batch in batches:  # the caption, its embedding and the image speak of the same row
        for caption, embedding, latents in zip(batch["captions"], batch["embeddings"], batch["latents"], strict=True):
            assert caption == f"{embedding[0]:.0f}/{embedding[1]:.0f}"
            assert (latents == embedding[0]).all()
    return [batch["captions"].tolist() for batch in batches]


@pytest.mark.usefixtures("local_ray")
def test_an_epoch_is_every_row_once_and_the_next_is_in_another_order_with_other_captions(encoded: Store) -> None:
    stream = Stream(encoded, files_of(encoded), seed=1)
    batches = captions_of(stream, 0, 14)
    flat = [caption for batch in batches for caption in batch]
    first, second = ([caption.split("/") for caption in half] for half in (flat[:21], flat[21:]))
    for epoch in (first, second):
        assert sorted(int(number) for number, _ in epoch) == list(range(21))
        assert [number for number, _ in epoch] != sorted(number for number, _ in epoch)
    assert [number for number, _ in first] != [number for number, _ in second]
    assert {tuple(row) for row in first}.isdisjoint(tuple(row) for row in second)
    assert captions_of(stream, 5, 14) == batches[5:], "a start is a suffix"
    assert captions_of(stream, 9, 9) == []


@pytest.mark.usefixtures("local_ray")
def test_any_number_of_ranks_has_the_same_batches_row_for_row(encoded: Store) -> None:
    stream = Stream(encoded, files_of(encoded), seed=1, window_rows=12)
    alone = captions_of(stream, 0, 14, size=6)
    rows = Counter(caption.split("/")[0] for caption in chain(*alone))
    assert set(rows.values()) == {4}, "four epochs in windows that end where no epoch does"
    for ranks in (2, 3, 6):
        shares = [captions_of(stream, 3, 6, rank, ranks, size=6) for rank in range(ranks)]
        assert [list(chain(*batch)) for batch in zip(*shares, strict=True)] == alone[3:6]


@pytest.mark.usefixtures("local_ray")
def test_a_row_has_an_identity_of_its_own_in_each_epoch(encoded: Store) -> None:
    batches = list(Stream(encoded, files_of(encoded), seed=1).batches(3, 0, 14, 0, 1))
    rows = np.concatenate([batch["rows"] for batch in batches])
    assert rows.dtype == np.int64
    assert len(set(rows.tolist())) == 2 * ROWS * PARTS
    first = {caption.split("/")[0] for caption in chain(*(batch["captions"] for batch in batches[:7]))}
    assert len(first) == ROWS * PARTS, "the two halves are two epochs of the same rows"


@pytest.mark.usefixtures("local_ray")
def test_a_code_s_stream_has_its_captions_only(encoded: Store, assigned: Store) -> None:
    for code, files in enumerate(files_by_code(assigned, 3)):
        assert sum(file.rows for file in files) == 14
        stream = Stream(encoded, files, seed=0, assigned=assigned, code=code)
        flat = list(chain(*captions_of(stream, 0, 7, size=2)))
        assert len({caption.split("/")[0] for caption in flat}) == 14
        assert {sum(map(int, caption.split("/"))) % 3 for caption in flat} == {code}
    with pytest.raises(ConfigError, match="no row of code 3"):
        Stream(encoded, files_by_code(assigned, 4)[3], seed=0, assigned=assigned, code=3)


@pytest.mark.usefixtures("local_ray")
def test_a_damaged_file_is_one_line_wherever_it_was_read(encoded: Store) -> None:
    stream, file = Stream(encoded, files_of(encoded), seed=1), Path(encoded.uri, "part-00001.parquet")
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"^{file}: is damaged \([^\n]+$"):
        captions_of(stream, 0, 7)


def test_what_a_stage_asks_before_it_starts(encoded: Store) -> None:
    stream = Stream(encoded, files_of(encoded), seed=0)
    assert latent_size(encoded) == (2, 2)
    assert stream.num_captions() == ROWS * PARTS * CAPTIONS
    some = stream.embeddings(5)[:, 0].tolist()
    assert len(some) == 5
    assert {later - earlier for earlier, later in pairwise(some)} == {4}, "evenly taken"
    assert len(stream.embeddings(1000)) == ROWS * PARTS
