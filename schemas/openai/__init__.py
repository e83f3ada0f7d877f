"""OpenAI's API: requests to ``/v1/chat/completions`` and ``/v1/completions`` in, its answers out."""

from .answers import response_body, usage_body
from .chunks import Chunks
from .messages import parse_messages
from .requests import COMPLETIONS_DEFAULT_MAX_TOKENS, PARSERS, Request, parse_chat, parse_completion

__all__ = [
    "COMPLETIONS_DEFAULT_MAX_TOKENS",
    "PARSERS",
    "Chunks",
    "Request",
    "parse_chat",
    "parse_completion",
    "parse_messages",
    "response_body",
    "usage_body",
]
