"""The HTTP side of the server: API keys and limits, OpenAI's request and response bodies, streams, the ingress."""
