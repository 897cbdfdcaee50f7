"""Log lines in both forms, and what does not get into them."""

import io
import json
import logging
import subprocess
import sys
from logging.config import dictConfig

import pytest

from flashrl_rollout.logs import ENGINE_CONFIG, JsonFormatter, TextFormatter, fields


def line(formatter: logging.Formatter, message: str, *args: object, **options: object) -> str:
    """What a logger with this formatter writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("flashrl_rollout.test")
    logger.addHandler(handler)
    logger.info(message, *args, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def test_text_line_ends_with_its_fields() -> None:
    found = line(TextFormatter(), "committed", extra=fields(kind="delta", version=3, seconds=0.25, run_id=None))
    assert found.partition(" INFO ")[2] == "flashrl_rollout.test: committed kind=delta version=3 seconds=0.25\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [("two words", '"two words"'), ("a\nb", '"a\\nb"'), ("a=b", '"a=b"'), ("", '""'), ([3, 4], '"[3, 4]"')],
)
def test_field_cannot_be_taken_for_another_or_for_a_line(value: object, shown: str) -> None:
    assert line(TextFormatter(), "x", extra=fields(error=value)).endswith(f"x error={shown}\n")


def test_json_line_is_one_object() -> None:
    found = line(JsonFormatter(), "took %d\nsteps", 2, extra=fields(version=3, versions=[2, 3], level="mine"))
    assert found.count("\n") == 1
    values = json.loads(found)
    assert values.pop("time").endswith("Z")
    assert values.pop("pid") > 0
    assert values == {
        "level": "info",
        "logger": "flashrl_rollout.test",
        "message": "took 2\nsteps",
        "version": 3,
        "versions": [2, 3],
    }


def test_traceback_is_part_of_the_object() -> None:
    try:
        raise ZeroDivisionError("no")
    except ZeroDivisionError:
        found = line(JsonFormatter(), "failed", exc_info=True)
    assert found.count("\n") == 1
    assert json.loads(found)["exception"].endswith("ZeroDivisionError: no")


def test_debug_is_for_this_package_alone() -> None:
    program = """
import logging
from flashrl_rollout.logs import set_up_logging
set_up_logging("debug", "json")
logging.getLogger("flashrl_rollout.store").debug("ours")
logging.getLogger("httpcore").debug("Authorization: Bearer")
logging.getLogger("uvicorn.error").error("theirs")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(row)["message"] for row in done.stderr.splitlines()] == ["ours", "theirs"]


def test_engine_processes_log_json_from_their_own_level_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [logging.getLogger(name) for name in ("vllm", "py.warnings")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        dictConfig(json.loads(ENGINE_CONFIG.read_text()))
        logging.getLogger("vllm.v1.engine").warning("not this")
        logging.getLogger("vllm.v1.engine").error("this")
        logging.getLogger("py.warnings").warning("that")
    finally:
        logging.captureWarnings(False)
        for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers, logger.propagate = handlers, propagate
    rows = [json.loads(row) for row in capsys.readouterr().err.splitlines()]
    assert [(row["logger"], row["message"]) for row in rows] == [("vllm.v1.engine", "this"), ("py.warnings", "that")]
