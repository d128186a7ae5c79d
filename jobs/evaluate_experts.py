"""Score teacher, baselines and experts on the held-out captioned images.

If the config names `experiment.budgets`, the method and its opponents are first trained at each of them, as runs of
their own under the root; then all are scored and compared.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate_experts.py --config jobs/configs/bucket.yaml
"""

from collections.abc import Collection
from typing import Any

from aptp_platform.config import ConfigError, RunConfig
from aptp_platform.run.job import run_restartable
from aptp_platform.run.path import run_stage
from aptp_platform.run.stages import STAGES


def evaluate(config: RunConfig, restart: Collection[str]) -> Any:
    if not config.experiment.budgets:
        if others := sorted({*restart} - {"evaluate"}):
            raise ConfigError(f"--restart {others[0]}: without experiment.budgets this job runs evaluate alone")
        return run_stage("evaluate", config, restart="yes" if restart else "no")
    from aptp_platform.experts.experiment.runs import experiment

    return experiment(config, restart)


if __name__ == "__main__":
    run_restartable(evaluate, list(STAGES), __doc__)
