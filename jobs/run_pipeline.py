"""Run every stage of the path as one job; what is finished is reused, and what was interrupted goes on.

If the config names `experiment.budgets`, the method's opponents are trained after that, and all are compared.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/run_pipeline.py --config jobs/configs/bucket.yaml
"""

from collections.abc import Collection

from aptp_platform.config import RunConfig
from aptp_platform.run.facts import Facts
from aptp_platform.run.job import run_restartable
from aptp_platform.run.path import run_stage
from aptp_platform.run.stages import STAGES, readers_of


def run_pipeline(config: RunConfig, restart: Collection[str]) -> None:
    """A stage that is started anew starts those anew that read it."""
    known, readers = Facts(config), readers_of(restart)
    for stage in STAGES:
        run_stage(
            stage, config, restart="yes" if stage in restart else "changed" if stage in readers else "no", known=known
        )
    if config.experiment.budgets:
        from aptp_platform.experts.experiment.runs import experiment

        experiment(config, restart)


if __name__ == "__main__":
    run_restartable(run_pipeline, list(STAGES), __doc__)
