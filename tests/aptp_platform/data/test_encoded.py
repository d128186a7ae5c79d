"""The stored rows round-trip bit for bit, and captions are chosen by one rule."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aptp_platform.data.encoded import choose_caption, encoded_table, read_encoded, write_table
from aptp_platform.storage.errors import DamagedError
from aptp_platform.storage.store import Store


def rows(first: int, count: int) -> dict[str, Any]:
    noise = np.random.default_rng(first)
    counts = [1 + index % 3 for index in range(count)]
    return {
        "positions": list(range(first, first + count)),
        "keys": [f"key-{first + index}" for index in range(count)],
        "latents": noise.standard_normal((count, 4, 2, 2)).astype(np.float16),
        "captions": [[f"caption {each}" for each in range(n)] for n in counts],
        "embeddings": [noise.standard_normal((n, 6)).astype(np.float16) for n in counts],
        "tags": ["{}"] * count,
    }


def test_rows_round_trip_through_files(tmp_path):
    store = Store.open(tmp_path)
    parts = [rows(0, 300), rows(300, 7)]  # more and fewer than a row group
    for index, part in enumerate(parts):
        write_table(store, f"part-{index}.parquet", encoded_table(**part))
    read = {row["key"]: row for row in read_encoded(store)}
    assert len(read) == 307
    for part in parts:
        for index, key in enumerate(part["keys"]):
            row = read[key]
            assert row["position"] == part["positions"][index]
            assert row["captions"] == part["captions"][index]
            assert row["latents"].dtype == row["embeddings"].dtype == np.float16
            np.testing.assert_array_equal(row["latents"], part["latents"][index])
            np.testing.assert_array_equal(row["embeddings"], part["embeddings"][index])
    assert set(read_encoded(store, ["key", "latents"])[0]) == {"key", "latents"}


def test_nothing_in_a_file_is_a_pickle(tmp_path):
    write_table(Store.open(tmp_path), "part.parquet", encoded_table(**rows(0, 3)))
    for key, value in pq.read_metadata(tmp_path / "part.parquet").metadata.items():
        assert b"pickle" not in value, key
        assert b"\x80\x05" not in value, key
    kinds = pa.parquet.read_schema(tmp_path / "part.parquet")
    assert kinds.field("latents").type.extension_name == "arrow.fixed_shape_tensor"


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="run the encode job first"):
        read_encoded(Store.open(tmp_path / "absent"))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_caption_is_used_once_in_as_many_epochs(count):
    for key in ("a", "b", "c"):
        chosen = [choose_caption(key, count, epoch, 3) for epoch in range(count)]
        assert sorted(chosen) == list(range(count))
        assert choose_caption(key, count, count, 3) == chosen[0]


def test_the_choice_is_fair_over_keys_and_differs_between_seeds():
    first = [choose_caption(f"key-{index}", 4, 0, 0) for index in range(4000)]
    assert all(900 < uses < 1100 for uses in Counter(first).values())
    other = [choose_caption(f"key-{index}", 4, 0, 1) for index in range(4000)]
    assert 0.2 < np.mean(np.array(first) == np.array(other)) < 0.3
    with pytest.raises(ValueError, match="key-1: has 0 captions"):
        choose_caption("key-1", 0, 0, 0)


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    store = Store.open(tmp_path)
    file = tmp_path / "part-0.parquet"
    write_table(store, file.name, encoded_table(**rows(0, 300)))
    whole = file.read_bytes()
    half = len(whole) // 2
    for damaged in (whole[:half], b"", whole[:half] + bytes(64) + whole[half + 64 :]):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError, match=rf"^{file}: is damaged \([^\n]+\): bring it back[^\n]+$"):
            read_encoded(store)
