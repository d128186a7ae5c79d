"""A run over random rows: `tiny_pipeline` as the model, and an encoded data set written without encoding anything."""

from pathlib import Path

import numpy as np

from aptp_platform.config import RunConfig
from aptp_platform.config_file import parse_config
from aptp_platform.data.encoded import encoded_table, write_table
from aptp_platform.storage.store import Store
from tests.support.tiny_pipeline import build_pipeline

ROWS, DIM, CAPTIONS = 24, 6, 2


def tiny_run(folder: Path, *, num_codes: int = 2, budget: float = 0.7, steps: int = 4, workers: int = 1) -> RunConfig:
    """The config of a run whose `encoded/` stands: two files of training rows, one of held-out rows."""
    build_pipeline().save_pretrained(folder / "model")
    root = Store.open(folder / "run")
    noise = np.random.default_rng(0)
    for part, name in enumerate(("train/part-00000", "train/part-00001", "heldout/part-00000")):
        numbers = [part * ROWS + row for row in range(ROWS)]
        table = encoded_table(
            numbers,
            [f"key{number}" for number in numbers],
            noise.normal(size=(ROWS, 4, 8, 8)).astype(np.float16),
            [[f"{'red' if number % 2 else 'blue'} {caption}" for caption in range(CAPTIONS)] for number in numbers],
            [(noise.normal(size=(CAPTIONS, DIM)) + 4 * (number % 2)).astype(np.float16) for number in numbers],
            ["{}"] * ROWS,
        )
        write_table(root.join("encoded"), f"{name}.parquet", table)
    for name in ("train-00.tar", "test_00.tar"):  # what is encoded above; a stage asks only whether they have changed
        (folder / name).touch()
    training = {
        "steps": steps, "batch_size": 8, "warmup_steps": 2, "workers": workers, "cpus_per_worker": 0.5,
        "checkpoint_every": 2, "learning_rate": 0.01,
    }  # fmt: skip
    return parse_config(
        {
            "root": str(folder / "run"),
            "data": {"source": str(folder), "image_size": 16},
            "model": {"pipeline": str(folder / "model")},
            "router": {"num_codes": num_codes, "budget": budget, "need": {"enough": 8}},
            "prune": {"run": training, "objective": {"warmup_steps": 1, "balance": 10.0}},
            "assign": {"if_fewer": "merge"},
            "finetune": {"run": training},
            "evaluate": {"timesteps": [500], "batch_size": 8},
            "tune": {"num_codes": [1, 2], "budgets": [0.8], "trials": 2},
        }
    )
