"""Learn the prompt router and the architecture codes on the gated, frozen UNet.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/prune_unet.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("prune", __doc__)
