"""What most people write: FastAPI around the stock pipeline, one image at a time, torch on every core.

python benchmarks/peer_fastapi.py RELEASE PORT STEPS
"""

import base64
import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI


def main(release: str, port: str, steps: str) -> None:
    torch.set_num_threads(2)
    pipeline = StableDiffusionPipeline.from_pretrained(f"{release}/pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    app, turn = FastAPI(), threading.Lock()

    @app.post("/generate")
    def generate(body: dict[str, Any]) -> dict[str, str]:
        with turn, torch.inference_mode():
            generator = torch.Generator().manual_seed(body["seed"])
            image = pipeline(body["prompt"], num_inference_steps=int(steps), generator=generator).images[0]
        stream = io.BytesIO()
        image.save(stream, "png")
        return {"b64_json": base64.b64encode(stream.getvalue()).decode()}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
