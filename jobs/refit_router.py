"""Measure the fine-tuned experts on training prompts, and fit the router to what was measured.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/refit_router.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("refit", __doc__)
