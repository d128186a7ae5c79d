"""What popular clients send when nobody changed their settings, as their sources say (late 2026).

Each is the JSON of one `POST /v1/images/generations`, and where the client then looks for the picture.
"""

from typing import Any, Final

_PROMPT: Final = "a red cat"

CLIENT_REQUESTS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "Open WebUI": (
        {"model": "dall-e-2", "prompt": _PROMPT, "n": 1, "size": "512x512", "response_format": "b64_json"},
        "b64_json",
    ),
    "Open WebUI, GPT image": ({"model": "gpt-image-1.5", "prompt": _PROMPT, "n": 1, "size": "1024x1024"}, "b64_json"),
    "LibreChat": (
        {
            "model": "gpt-image-1", "prompt": _PROMPT, "n": 1, "background": "transparent", "output_format": "png",
            "quality": "auto", "size": "auto",
        },
        "b64_json",
    ),
    "Vercel AI, openai-compatible": (
        {"model": "auto", "prompt": _PROMPT, "n": 1, "size": "1024x1024", "response_format": "b64_json"},
        "b64_json",
    ),
    "LiteLLM": (
        {
            "model": "openai/auto", "prompt": _PROMPT, "n": 1, "quality": "standard", "response_format": "url",
            "size": "1024x1024", "style": "vivid", "user": "u1", "background": "auto", "moderation": "auto",
            "output_compression": 100, "output_format": "png",
        },
        "url",
    ),
    "LobeChat": (
        {
            "model": "gpt-image-2", "prompt": _PROMPT, "n": 1, "cfg": 4.5, "steps": 4, "seed": -1, "width": 1024,
            "height": 768,
        },
        "b64_json",
    ),
    "Nextcloud": ({"prompt": _PROMPT, "size": "1024x1024", "n": 1, "model": "dall-e-2"}, "url"),
    "AnythingLLM": ({"model": "dall-e-3", "prompt": _PROMPT, "size": "1024x1024", "n": 1}, "url"),
    "SillyTavern": (
        {
            "prompt": _PROMPT, "model": "dall-e-3", "size": "1024x1024", "n": 1, "quality": "standard",
            "style": "vivid", "response_format": "b64_json",
        },
        "b64_json",
    ),
    "LangChain DallE": (
        {"model": "dall-e-2", "prompt": _PROMPT, "n": 1, "size": "1024x1024", "quality": "standard"},
        "url",
    ),
    "LangChain.js DallE": (
        {
            "model": "dall-e-3", "prompt": _PROMPT, "n": 1, "size": "1024x1024", "response_format": "url",
            "style": "vivid", "quality": "standard", "user": None,
        },
        "url",
    ),
    "OpenAI SDK, every field": (
        {
            "model": "gpt-image-2.5-flare", "prompt": _PROMPT, "background": "opaque", "complexity": "low",
            "moderation": "low", "n": 1, "output_compression": 80, "output_format": "webp", "partial_images": 0,
            "quality": "xhigh", "safety_identifier": "s", "size": "1536x1024", "stream": False, "user": "u",
        },
        "b64_json",
    ),
}  # fmt: skip
