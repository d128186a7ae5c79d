"""Score teacher, baselines and experts on the held-out captioned images.

If the config names `experiment.budgets`, the method and its opponents are first trained at each of them, as runs of
their own under the root; then all are scored and compared.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate_experts.py --config jobs/configs/bucket.yaml
"""

from typing import Any

from aptp_platform.config import RunConfig
from aptp_platform.run.job import run_function
from aptp_platform.run.path import run_stage


def evaluate(config: RunConfig) -> Any:
    if not config.experiment.budgets:
        return run_stage("evaluate", config)
    from aptp_platform.experts.experiment.runs import experiment

    return experiment(config)


if __name__ == "__main__":
    run_function(evaluate, __doc__)
