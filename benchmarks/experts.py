"""Does slicing pay? Each expert of a release against the teacher: MACs, parameters and CPU seconds, interleaved.

    .venv/bin/python -m benchmarks.experts runs/demo/release

Times are process CPU seconds of one forward pass, the minimum over the rounds, networks taking turns. Efficiency is the
realised speed-up over the one that the MACs promise; a small network is bound by overhead, a full-size one is not.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from aptp import AptpPipeline, read_release
from benchmarks.clock import cpu_seconds, write_results
from benchmarks.library import forward_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    release = read_release(args.release)
    pipeline = AptpPipeline.from_release(args.release, verify=False)
    teacher = pipeline.teacher
    if teacher is None:
        raise SystemExit(
            f"error: release: {args.release} was published without its teacher; publish it with the teacher"
        )
    networks = {"teacher": teacher} | {f"{code:02d}": pipeline.expert(code) for code in range(release.num_codes)}
    height, width = release.info.latent_size
    forward = forward_of(teacher, (height, width), release.info.num_text_tokens, args.batch)
    seconds = cpu_seconds({name: partial(forward, network) for name, network in networks.items()}, args.rounds)
    ratios = {"teacher": 1.0} | {f"{index:02d}": code.ratio for index, code in enumerate(release.codes)}
    rows = []
    print(f"{'network':8} {'MACs':>6} {'params':>7} {'CPU s':>8} {'speed-up':>9} {'efficiency':>11}")
    for name, network in networks.items():
        speedup = seconds["teacher"] / seconds[name]
        share = sum(p.numel() for p in network.parameters()) / sum(p.numel() for p in teacher.parameters())
        row = {"network": name, "macs_ratio": ratios[name], "params_ratio": share, "cpu_s": seconds[name]}
        efficiency = speedup * ratios[name]
        rows.append(row | {"speedup": speedup, "efficiency": efficiency})
        print(f"{name:8} {ratios[name]:6.3f} {share:7.3f} {seconds[name]:8.4f} {speedup:8.2f}x {efficiency:11.2f}")
    print(write_results("experts", [], networks=rows))


if __name__ == "__main__":
    main()
