"""What the trainer and the rollout service have in common: messages, the stored weight form and its bytes.

Knows nothing of vLLM, FSDP, sockets or files.
"""

PROTOCOL_VERSION = 1
"""Raised when a message, the digest or the handshake changes meaning; both sides must agree."""

CODEC_VERSION = 1
"""Raised when the bytes of an encoded update change meaning; a service refuses another one by number."""
