"""LitServe around the stock pipeline: one worker a core, whole requests batched.

.venv-bench/bin/python benchmarks/peer_litserve.py RELEASE PORT STEPS
"""

import base64
import io
import sys
from typing import Any

import litserve
import torch
from diffusers import StableDiffusionPipeline


class Images(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """One worker."""

    def __init__(self, release: str, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.release, self.steps = release, steps

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.pipeline = StableDiffusionPipeline.from_pretrained(f"{self.release}/pipeline", safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def predict(self, inputs: list[dict[str, Any]]) -> list[Any]:
        generators = [torch.Generator().manual_seed(each["seed"]) for each in inputs]
        prompts = [each["prompt"] for each in inputs]
        with torch.inference_mode():
            return self.pipeline(prompts, num_inference_steps=self.steps, generator=generators).images

    def encode_response(self, output: Any) -> dict[str, str]:
        stream = io.BytesIO()
        output.save(stream, "png")
        return {"b64_json": base64.b64encode(stream.getvalue()).decode()}


def main(release: str, port: str, steps: str) -> None:
    api = Images(release, int(steps), max_batch_size=4, batch_timeout=0.02, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=2, timeout=120)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
