"""A training stage computes where its worker says, and a step of it waits for nobody."""

from pathlib import Path

import pytest
import torch

from aptp.baselines import uniform_code
from aptp.cost import cost_table
from aptp.expert import BaseModel, save_expert
from aptp.noise import Noise
from aptp.sites import read_space
from aptp.slicing import slice_unet
from aptp_platform.models import load_pipeline_parts
from aptp_platform.storage.store import Store
from aptp_platform.train.specs import FinetuneSpec
from aptp_platform.train.stream import Stream, files_of
from tests.support.one_device import OnMeta
from tests.support.tiny_run import tiny_run


@pytest.mark.usefixtures("local_ray")
def test_batches_and_steps_are_on_the_worker_s_device(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    unet = load_pipeline_parts(config.model, config.storage).unet
    space = read_space(unet)
    table = cost_table(unet, space, latent_size=(8, 8), num_text_tokens=5)
    code = uniform_code(unet, space, table, 0.7)
    expert = Path(config.root, "cut", "00")
    save_expert(expert, slice_unet(unet, code), code, base=BaseModel.of(unet, "here"), cost=table)

    encoded = Store.open(config.root).join("encoded", "train")
    work = FinetuneSpec(config, Stream(encoded, files_of(encoded), 0), "00", steps=1).build(torch.device("meta"))
    module = work.module.to("meta")  # as the engine moves it
    batch = next(work.batches(0, 0, 1))
    with OnMeta():
        module(batch, noise=Noise(0, 0, batch.rows)).total.backward()
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)
