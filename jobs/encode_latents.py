"""Images to latents and captions to sentence embeddings, once, by Ray Data.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/encode_latents.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("encode", __doc__)
