"""Check a Serve config file before it is deployed: every key, the release, the keys file. Nothing is started.

python jobs/check_server.py --serve-config serve_configs/demo.yaml
"""

import argparse
import sys
from pathlib import Path

from aptp_platform.serve.config_check import check_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve-config", type=Path, required=True)
    args = parser.parse_args()
    try:
        print(f"{args.serve_config}: can be deployed: {', '.join(check_config(args.serve_config))}")
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
