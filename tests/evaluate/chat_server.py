"""Moved to tests/helpers.py."""

from helpers import chat_server, completion

__all__ = ["chat_server", "completion"]
