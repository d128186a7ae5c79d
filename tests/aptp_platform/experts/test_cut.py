"""What is cut is what the router's codes say, and what cannot be cut is said before anything is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aptp.expert import load_expert, read_expert_info
from aptp.gates import gated
from aptp.router import Router
from aptp.routes import RouterConfig
from aptp.sites import read_space
from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.experts.cut import cut
from tests.support import tiny
from tests.support.tiny_run import DIM, tiny_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with a router whose codes lie around the threshold."""
    config = tiny_run(tmp_path)
    shape = RouterConfig(2, DIM, routing="similarity", initial_logit=-3.0)
    Router(read_space(tiny.unet()), shape, generator=torch.Generator().manual_seed(1)).save(
        Path(config.root) / "assigned" / "router"
    )
    return config


@pytest.mark.usefixtures("local_ray")
@torch.no_grad()
def test_a_cut_expert_is_the_gated_unet(config: RunConfig) -> None:
    summary = cut(config)
    root, unet = Path(config.root), tiny.unet()
    router = Router.load(root / "assigned" / "router")
    inputs = tiny.inputs(unet)
    for index, code in enumerate(router.architecture_codes()):
        folder = root / "cut" / f"{index:02d}"
        with gated(unet, router.space) as gates:
            gates.set(code.mask.expand(2, -1))
            expected = unet(**inputs).sample
        torch.testing.assert_close(load_expert(folder)(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
        info = read_expert_info(folder)
        assert summary["MACs ratios"][f"{index:02d}"] == pytest.approx(info.cost.ratio, abs=1e-4)
        assert info.cost.latent_size == (8, 8)
        assert torch.equal(info.code.bits, code.bits)
    assert read_expert_info(root / "cut" / "uniform").cost.ratio == pytest.approx(config.router.budget, abs=0.02)


def test_what_cannot_be_cut(config: RunConfig) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(ConfigError) as error:
            cut(replace(config, cut=replace(config.cut, **changes)))  # type: ignore[arg-type]
        assert not (Path(config.root) / "cut").exists()
        return str(error.value)

    assert refused(baselines=("unform",)).startswith("cut.baselines: 'unform': must be one of uniform, magnitude")
