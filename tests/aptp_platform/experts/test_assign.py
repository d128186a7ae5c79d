"""Every caption goes to the code that the router says, file by file; a code that nobody uses is an error."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from aptp.router import Router
from aptp.routes import RouterConfig
from aptp.sites import read_space
from aptp_platform.config import AssignConfig, ConfigError, RunConfig
from aptp_platform.data.encoded import encoded_table, read_encoded, write_table
from aptp_platform.experts.assign import assign
from aptp_platform.run.layout import assigned_router
from aptp_platform.storage.store import Store
from tests.support import tiny

DIM = 6
COUNTS = (1, 3, 2, 1, 4, 2)  # captions of each row


@pytest.fixture
def config(tmp_path, local_ray) -> RunConfig:
    """Two encoded files, and a router whose codes are what it predicts for the first and the last caption."""
    root = Store.open(tmp_path)
    noise = np.random.default_rng(0)
    embeddings = [noise.standard_normal((count, DIM)).astype(np.float16) for count in COUNTS]
    for part in range(2):
        rows = range(part * 3, part * 3 + 3)
        table = encoded_table(
            list(rows),
            [f"key-{row}" for row in rows],
            noise.standard_normal((3, 4, 2, 2)).astype(np.float16),
            [[f"caption {row} {number}" for number in range(COUNTS[row])] for row in rows],
            [embeddings[row] for row in rows],
            ["{}"] * 3,
        )
        write_table(root, f"encoded/train/part-{part:06d}-000000000.parquet", table)
    shape, generator = RouterConfig(2, DIM, routing="similarity"), torch.Generator().manual_seed(0)
    router = Router(read_space(tiny.unet()), shape, generator=generator)
    router.centre_embeddings(torch.ones(1, DIM))
    ends = torch.from_numpy(np.stack([embeddings[0][0], embeddings[-1][-1]])).float()
    with torch.no_grad():
        router.codes.copy_(router.predictor(ends))
    router.save(tmp_path / "shared" / "router")
    return replace(RunConfig(), root=str(tmp_path))


def encoded(config: RunConfig) -> Store:
    return Store.open(config.root).join("encoded", "train")


def test_each_caption_has_the_code_that_the_router_gives_it_alone(config):
    summary = assign(config)
    root = Path(config.root)
    router = Router.load(root / "shared" / "router")
    files = sorted(path.name for path in (root / "encoded" / "train").iterdir())
    assert sorted(path.name for path in (root / "assigned").glob("*.parquet")) == files
    usage, familiarity = torch.zeros(2), []
    for name in files:
        encoded = pq.read_table(root / "encoded" / "train" / name).to_pylist()
        assigned = pq.read_table(root / "assigned" / name).to_pylist()
        assert [row["key"] for row in assigned] == [row["key"] for row in encoded]
        for row, given in zip(encoded, assigned, strict=True):
            for embedding, code in zip(row["embeddings"], given["codes"], strict=True):
                (expected,) = router.route_embeddings(torch.from_numpy(embedding)[None].float()).indices
                assert code == expected
                usage[code] += 1
            familiarity.extend(router.familiarity(torch.from_numpy(row["embeddings"]).float()).tolist())
    assert summary["captions"] == sum(COUNTS)
    assert summary["familiar"] == pytest.approx(min(familiarity), abs=2e-3), "all but one in a hundred"
    assert summary["shares"] == pytest.approx((usage / usage.sum()).tolist(), abs=1e-6)


def test_a_code_with_too_few_prompts_is_merged_into_those_nearest_to_each(config, capsys):
    folder = Path(config.root) / "shared" / "router"
    two = Router.load(folder)
    three = Router(two.space, replace(two.config, num_codes=3))
    twin = {
        name: value[[1, 0, 0]]
        for name, value in two.state_dict().items()
        if value.shape[:1] == (2,) and name != "shift"
    }
    three.load_state_dict({**two.state_dict(), **twin})
    three.bias.copy_(torch.tensor([0.0, 0.0, -1e-6]))  # the last is the middle one's twin, only a little less near
    three.save(folder)
    with pytest.raises(ConfigError, match=r"assign.min_prompts: 1: code 2 has 0 of 13 prompts: lower it, set"):
        assign(config)
    assert not (Path(config.root) / "assigned").exists()
    before = assign(replace(config, assign=AssignConfig(min_prompts=1, if_fewer="merge")))
    assert before["kept"] == [0, 1]
    assert "code 2 has 0 of 13 prompts, assign.min_prompts is 1: codes [2] are merged" in capsys.readouterr().out
    expected = two.keeping([1, 0])
    torch.testing.assert_close(assigned_router(config).state_dict(), expected.state_dict())
    embeddings = torch.from_numpy(np.concatenate([row["embeddings"] for row in read_encoded(encoded(config))])).float()
    assert before["shares"] == pytest.approx(expected.route_embeddings(embeddings).usage().tolist(), abs=1e-5)

    alone = assign(replace(config, assign=AssignConfig(min_prompts=13, if_fewer="merge")))
    assert (alone["codes"], alone["shares"]) == (1, [1.0])


def test_nothing_to_route_is_named(config):
    Store.open(config.root).remove("encoded")
    with pytest.raises(ValueError, match="run the encode job first"):
        assign(config)
