"""Score teacher, baselines and experts on the held-out captioned images.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate_experts.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("evaluate", __doc__)
