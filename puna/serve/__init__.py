"""HTTP ↔ engine: the OpenAI-compatible API, its limits and metrics, the chat page."""
