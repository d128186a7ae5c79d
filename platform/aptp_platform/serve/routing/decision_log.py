"""A log of routing decisions: one JSON line a request, which can be replayed against another release."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

from aptp_platform.serve.args import DecisionArgs
from aptp_platform.serve.messages import Catalog, Choice, GenerationRequest


def prompt_digest(prompt: str) -> str:
    """What stands for a prompt where prompts are not logged."""
    return hashlib.sha256(prompt.encode()).hexdigest()


class DecisionLog:
    """Lines of one router replica, in a file of its own; it is renewed when it reaches `max_bytes`, and the one before
    is kept. Without a folder nothing is written."""

    def __init__(self, args: DecisionArgs, catalog: Catalog) -> None:
        self._args, self._catalog = args, catalog
        self._handler: logging.Handler | None = None
        if args.folder is not None:
            folder = Path(args.folder)
            folder.mkdir(parents=True, exist_ok=True)
            name = folder / f"decisions-{os.uname().nodename}-{os.getpid()}.jsonl"
            self._handler = RotatingFileHandler(name, maxBytes=args.max_bytes, backupCount=1, encoding="utf-8")

    def write(self, request: GenerationRequest, choice: Choice, outcome: str, seconds: float) -> None:
        """outcome: ok, refused, cancelled or failed."""
        if self._handler is None:
            return
        losses = {each.model: round(each.loss, 8) for each in choice.predictions if each.loss is not None}
        similarities = [round(value, 5) for value in choice.similarities]
        line = {
            "time": round(time.time(), 3),
            "request_id": request.request_id,
            "key": request.caller,
            "release": self._catalog.release,
            "prompt": request.prompt if self._args.prompts == "plain" else None,
            "prompt_sha256": prompt_digest(request.prompt),
            "model": choice.model,
            "routed": choice.routed,
            "reason": choice.reason,
            "routing": choice.routing,
            "predicted_loss": losses or None,
            "similarities": similarities if choice.routing == "similarity" else None,
            "margin": round(choice.margin, 8),
            "unknown": choice.unknown,
            "macs": choice.macs,
            "ratio": choice.ratio,
            "budget": request.budget,
            "deadline_ms": request.deadline_ms,
            "price": request.price,
            "images": len(request.seeds),
            "num_inference_steps": request.steps,
            "outcome": outcome,
            "seconds": round(seconds, 4),
        }
        self._handler.emit(logging.makeLogRecord({"msg": json.dumps(line)}))
