"""The API token of the rollout service. Knows where it may stand; knows nothing of who asks for it."""

import os
from pathlib import Path

from flashrl_trainer.settings import RolloutSettings

TOKEN_VARIABLE = "FLASHRL_TOKEN"


def read_token(settings: RolloutSettings) -> str | None:
    """The token from FLASHRL_TOKEN, else from `rollout.token_file`; ValueError for a missing, empty or open one."""
    path = settings.token_file
    if os.environ.get(TOKEN_VARIABLE) or not path:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        is_open = Path(path).stat().st_mode & 0o077
        token = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"rollout.token_file: {path}: {error.strerror or error}") from None
    if not token:
        raise ValueError(f"rollout.token_file: {path} is empty")
    if is_open:
        raise ValueError(f"rollout.token_file: {path} is readable by others; run chmod 600 on it")
    return token
