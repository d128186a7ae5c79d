"""Publish the fine-tuned experts, the router and the report as an immutable release.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/publish_release.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("publish", __doc__)
