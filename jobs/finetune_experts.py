"""Fine-tune all experts side by side, each on its own prompts, distilled from the teacher.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/finetune_experts.py --config jobs/configs/bucket.yaml
"""

from aptp_platform.run.job import run_job

if __name__ == "__main__":
    run_job("finetune", __doc__)
