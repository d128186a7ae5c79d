"""Cut every code out of the UNet as a physically smaller expert, and the baselines beside them.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/cut_experts.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("cut", __doc__)
