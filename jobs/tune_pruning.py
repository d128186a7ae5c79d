"""Search the number of codes, the budget and more: each trial prunes, shares, assigns, cuts and scores.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/tune_pruning.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.experts.tune import tune
from aptp_platform.run.job import run_function

if __name__ == "__main__":
    run_function(tune, __doc__)
