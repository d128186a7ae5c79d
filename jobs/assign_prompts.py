"""Send every caption through the trained router and count who uses which code.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/assign_prompts.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("assign", __doc__)
