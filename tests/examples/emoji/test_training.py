"""The teacher's training: what it draws is what it says, and a run that goes on is the run undisturbed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.emoji.training.denoiser import CachedSet, DenoiserConfig, read_state, stratified_timesteps, train_denoiser
from examples.emoji.training.workers import Workers


def test_timesteps_are_one_a_slice_and_never_outside_the_schedule() -> None:
    drawn = stratified_timesteps(torch.rand(10, generator=torch.Generator().manual_seed(0)), 1000)
    assert (drawn // 100).tolist() == list(range(10))
    assert stratified_timesteps(torch.zeros(1), 1000).tolist() == [0]
    below_one = torch.full((16,), 1 - 2**-24)  # the largest fp32: added to its slice, it rounds up
    assert stratified_timesteps(below_one, 1000).max() == 999


def test_a_run_that_goes_on_from_its_checkpoint_is_the_run_undisturbed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = CachedSet(
        torch.randn(6, 4, 8, 8, generator=generator),
        torch.randn(6, 2, 5, 16, generator=generator),
        torch.zeros(5, 16),
    )
    config = DenoiserConfig(channels=(16, 16, 16, 16), heads=(2, 2, 2, 2), batch_size=2, images=8, warmup_images=2)

    def train(folder: Path, stop_after: int | None = None) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)

        def stop(_: object, images: int) -> None:
            if images == stop_after:
                raise InterruptedError

        every_step = replace(config, checkpoint_seconds=0.0)
        return train_denoiser(data, every_step, Workers(0, 1), folder, stop).state_dict()

    undisturbed = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "halves", stop_after=4)
    assert read_state(tmp_path / "halves")["images"] == 4
    resumed = train(tmp_path / "halves")
    for name, value in undisturbed.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
