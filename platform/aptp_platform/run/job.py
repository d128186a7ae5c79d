"""What every job script does: read the config, join the cluster, run one stage, end with one line."""

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import ray

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.config_file import load_config, places, with_absolute_places
from aptp_platform.run.path import reach_places, run_stage

# Without this a Ray head listens at the machine's address, whatever address it is given. The variable is named after
# the systems where it is the default; it works on every system.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_RESTART = "what is finished, or was made from another config, is put aside, not removed"
_COPIES = "working_dir_files"  # of a Ray session: where a submitted job finds the copy of its working directory


def run_job(stage: str, description: str | None, argv: Sequence[str] | None = None) -> None:
    """Run one stage of the path on the cluster that `ray job submit` started this script on."""

    def run(config: RunConfig, restart: Collection[str]) -> None:
        run_stage(stage, config, restart="yes" if restart else "no")

    run_restartable(run, [stage], description, argv)


def run_function(
    function: Callable[[RunConfig], Any], description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Parse `--config` and `--set`, call `function` with the config, and map bad input to one line and exit code 2."""
    run_restartable(lambda config, restart: function(config), (), description, argv)


def run_restartable(
    function: Callable[[RunConfig, Collection[str]], Any],
    stages: Sequence[str],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """As `run_function`; `function` also gets those of its stages that `--restart` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as jobs/configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one value")
    if stages:
        parser.add_argument(
            "--restart", action="append", default=[], choices=stages, metavar="STAGE", help="start it anew: " + _RESTART
        )
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.set)
        require_lasting(config, Path.cwd())
        config = with_absolute_places(config)  # so that a place is the same however it is written
        reach_places(config)
        # Without an address this is no submitted job: start a cluster of our own rather than join any other.
        address = os.environ.get("RAY_ADDRESS", "local")
        if address == "local" and not ray.is_initialized():
            _require_shielded()
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        function(config, getattr(args, "restart", []))
    except (ValueError, ray.exceptions.OutOfDiskError) as error:
        print(f"error: {cause_of(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; submit the job again to go on", file=sys.stderr, flush=True)
        sys.exit(130)  # 128 + SIGINT, as shells have it


def _require_shielded() -> None:
    """Ray's ports take orders from this machine alone, and with a token. Ray reads both from the environment when it is
    imported, so a script that was started without them starts once more."""
    wanted = LOOPBACK | {"RAY_AUTH_MODE": "token"}
    if all(os.environ.get(name) == value for name, value in wanted.items()) and "RAY_AUTH_TOKEN" in os.environ:
        return
    os.environ.update(wanted, RAY_AUTH_TOKEN=secrets.token_hex(32))
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def require_lasting(config: RunConfig, folder: Path) -> None:
    """ConfigError for a relative place if `folder`, the job's own, is a temporary copy that Ray made."""
    if _COPIES not in folder.parts:
        return
    for field, place in places(config).items():
        if "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{field}: {place}: is relative, but the job runs in a copy of the working directory that Ray throws "
                f"away; give the absolute path of a folder that every node has, or a URI: --set {field}=s3://bucket/key"
            )


def cause_of(error: BaseException) -> str:
    """The original message inside Ray's wrapping errors, as one line."""
    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, ray.exceptions.OutOfDiskError):
        return (
            "ray: the object store of a node is full, and so is the disk that it spills to: make room there, start Ray "
            "with --object-spilling-directory on a larger disk, or lower encode.batch_size and encode.readers"
        )
    return " ".join(str(error).split())
