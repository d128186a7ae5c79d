"""Replay a server's decision log against another release: how many prompts change their code, and what it costs.

python jobs/replay_decisions.py --release runs/demo/release --log /var/log/aptp
Hashed decisions (decisions.prompts: hashed) count where --prompts, a file with one prompt per line, holds the prompt.
"""

import argparse
import sys
from pathlib import Path

from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.routing.replay import replay
from aptp_platform.storage.store import StorageConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", required=True, help="a path, file:// or s3:// URI")
    parser.add_argument("--endpoint", help="of an S3-compatible server")
    parser.add_argument("--log", type=Path, action="append", required=True, help="a file or folder; may be repeated")
    parser.add_argument("--prompts", type=Path)
    args = parser.parse_args()
    try:
        texts = args.prompts.read_text().splitlines() if args.prompts else ()
        source = ReleaseSource(args.release, StorageConfig(endpoint=args.endpoint))
        print("\n".join(replay(args.log, source, texts).lines()))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
