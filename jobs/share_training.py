"""Train the network's weights under the gates of all codes, before each is cut out; off where `share.run.steps` is 0.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/share_training.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("share", __doc__)
