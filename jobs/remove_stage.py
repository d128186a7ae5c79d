"""Remove what stages of a run have made. Without --yes it only says what that would be.

python jobs/remove_stage.py --config jobs/configs/demo.yaml --stage encode --stage prune
"""

import argparse
import sys

from aptp_platform.config_file import load_config
from aptp_platform.run.record import held_by, remove_held
from aptp_platform.run.stages import STAGES
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one value")
    parser.add_argument("--stage", action="append", required=True, choices=list(STAGES))
    parser.add_argument("--yes", action="store_true", help="remove it")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.set)
        root = Store.open(config.root, config.storage)
        found = [(stage, held) for stage in dict.fromkeys(args.stage) for held in held_by(root, stage)]
        for _, held in found:
            state = "finished" if held.finished else "not finished"
            print(f"{root.join(held.name).uri}: {held.files} files, {held.bytes} bytes, {state}")
        if not found:
            print(f"{root.uri} holds nothing of {', '.join(args.stage)}")
        elif not args.yes:
            print("nothing is removed; --yes removes all of it")
        else:
            with Lease(root, "run"):
                for stage, held in found:
                    remove_held(root, stage, held)
            print("removed")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
