"""Run every stage of the path as one job; what is finished is reused, and what was interrupted goes on.

If the config names `experiment.budgets`, the method's opponents are trained after that, and all are compared.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/run_pipeline.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.config import RunConfig
from aptp_platform.run.job import run_function
from aptp_platform.run.path import STAGES, run_stage


def run_pipeline(config: RunConfig) -> None:
    for stage in STAGES:
        run_stage(stage, config)
    if config.experiment.budgets:
        from aptp_platform.experts.experiment.runs import experiment

        experiment(config)


if __name__ == "__main__":
    run_function(run_pipeline, __doc__)
