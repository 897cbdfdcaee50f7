"""Log lines of the service and of its engine's processes: as text for people, or one JSON object a line for programs.

Knows forms, levels and named values beside a message; knows nothing of what is said.
"""

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

LogFormat = Literal["text", "json"]

ENGINE_CONFIG = Path(__file__).with_name("engine_logging.json")
"""What vLLM's processes take as VLLM_LOGGING_CONFIG_PATH, so that their lines are JSON too."""

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FIELDS = "fields"
_PLAIN = re.compile(r"[\w.:/+-]+")


def fields(**values: object) -> dict[str, Any]:
    """`logger.info("committed", extra=fields(version=3, kind="delta"))`; None stands for what there is not."""
    return {_FIELDS: {name: value for name, value in values.items() if value is not None}}


class TextFormatter(logging.Formatter):
    """`2026-11-25 22:41:07,123 INFO flashrl_rollout.history: committed kind=delta version=3`."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class calls it so)
        """The line, without a traceback."""
        values: dict[str, object] = getattr(record, _FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{name}={_plain(value)}" for name, value in values.items())])


def _plain(value: object) -> str:
    """Quoted where it could be taken for more than one value, or for another line."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """`{"time": "2026-11-25T22:41:07.123Z", "level": "info", "logger": ..., "message": "committed", "version": 3}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One object on one line; a traceback is its `exception`."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, object] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in getattr(record, _FIELDS, {}).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _formatter(form: LogFormat) -> logging.Formatter:
    return JsonFormatter() if form == "json" else TextFormatter()


def set_up_logging(level: str, form: LogFormat = "text") -> None:
    """Log to standard error. `debug` is for this package: other libraries' details may hold headers and prompts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form))
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(least, logging.INFO), handlers=[handler])
    logging.getLogger("flashrl_rollout").setLevel(least)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the model hub's client
    if form == "json":
        logging.captureWarnings(True)


def engine_handler() -> logging.Handler:
    """What `engine_logging.json` names: JSON to standard error, from VLLM_LOGGING_LEVEL on."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper()
    logging.getLogger("vllm").setLevel(level)  # vLLM leaves that to the file, which cannot know
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    return handler
