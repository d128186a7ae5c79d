"""Weights packed ahead: a packed network answers as its source, and is used where it is the faster one."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from aptp_platform.serve.cpu.packing import PackedConv2d, PackedLinear, PackedWeights, PatchConv2d, pack_if_faster
from tests.support.tiny_pipeline import build_pipeline


@torch.inference_mode()
def test_a_packed_network_answers_as_its_source_for_any_batch_and_size() -> None:
    source, packed = (build_pipeline().unet for _ in range(2))
    packed.load_state_dict(source.state_dict())
    dim = source.config.cross_attention_dim

    def inputs(rows: int, height: int, width: int, tokens: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(rows, 4, height, width), torch.arange(rows) * 100, torch.randn(rows, tokens, dim)

    weights = PackedWeights.of([packed], lambda: packed(*inputs(2, 8, 8, 4)))
    kinds = {type(module) for module in packed.modules()}
    assert {PackedConv2d, PatchConv2d, PackedLinear} <= kinds
    assert nn.Linear not in kinds
    for given in (inputs(1, 8, 8, 3), inputs(5, 8, 8, 77), inputs(20, 8, 8, 4), inputs(3, 8, 16, 4)):
        torch.testing.assert_close(packed(*given).sample, source(*given).sample, rtol=1e-4, atol=1e-5)
    assert weights is not None
    weights.unpack()
    assert list(map(type, packed.modules())) == list(map(type, source.modules()))


@pytest.mark.parametrize(("packed_s", "kept"), [(0.5, PackedLinear), (2.0, nn.Linear)])
def test_the_faster_weights_are_kept_and_the_log_says_which(
    packed_s: float, kept: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, clock = nn.Sequential(nn.Linear(4, 4)), 0.0

    def trial() -> None:
        nonlocal clock
        clock += packed_s if isinstance(network[0], PackedLinear) else 1.0

    monkeypatch.setattr("time.process_time", lambda: clock)
    with caplog.at_level(logging.INFO, "ray.serve"):
        assert pack_if_faster("code-00", [network], trial, seconds=60) == (kept is PackedLinear)
    assert type(network[0]) is kept
    chosen = "packed" if kept is PackedLinear else "plain"
    assert f"code-00 has {chosen} weights: packed {packed_s:.4f} CPU s, plain 1.0000" in caplog.text


def test_what_has_no_packed_kernel_is_left_alone_and_nothing_is_run() -> None:
    kept = nn.Sequential(
        nn.Linear(4, 4).half(),
        nn.Linear(4, 4, device="meta"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    )
    before = list(kept)
    assert not pack_if_faster("code-00", [kept], lambda: pytest.fail("ran"), seconds=60)
    assert all(one is other for one, other in zip(kept, before, strict=True))


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (2, 0)}])
@torch.inference_mode()
def test_a_convolution_over_patches_is_the_convolution(geometry: dict[str, Any]) -> None:
    source = nn.Conv2d(5, 7, (3, 2), **geometry)
    patches = PatchConv2d(source)
    for size in ((2, 5, 4, 5), (1, 5, 3, 2), (3, 5, 9, 11)):
        images = torch.randn(size)
        torch.testing.assert_close(patches(images), source(images), rtol=1e-4, atol=1e-5)
