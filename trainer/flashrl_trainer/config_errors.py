"""Mistakes in settings as one line that names each key: `algorithm.tis_cap: must be >= 1, got 0.5 (from FILE)`.

It does not know how values were read, only which origin belongs to which key.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

LIMITS = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
    "less_than": ("<", "lt"),
}
COMPLAINTS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "may hold letters, digits and _ . + - only, a letter, digit or _ first",
    "tuple_type": "must be a list",
    "model_type": "must be a table",
}


def one_line(error: ValidationError, known: Sequence[str], origins: Mapping[str, str]) -> str:
    """All mistakes of `error`; `known` are the dotted keys to suggest from, `origins` maps a key to its source."""
    lines = [_line(mistake, known, origins) for mistake in error.errors(include_url=False)]
    return " ".join("; ".join(lines).split())


def plain(number: float) -> str:
    """1.0 as `1`, and a whole number with all its digits."""
    return f"{number:g}" if isinstance(number, float) else str(number)


def _line(mistake: Any, known: Sequence[str], origins: Mapping[str, str]) -> str:
    key, complaint = _key_and_complaint(mistake)
    if mistake["type"] == "extra_forbidden":
        complaint = f"unknown setting{_suggestion(key, known)}"
    origin = f" (from {origins[key]})" if key in origins else ""
    return f"{key}: {complaint}{origin}"


def _key_and_complaint(mistake: Any) -> tuple[str, str]:
    key = ".".join(str(part) for part in mistake["loc"][:2])
    if mistake["type"] == "value_error":
        raised = str(mistake["ctx"]["error"])
        if "." not in key:  # a check over several settings starts with the one it blames
            key, _, raised = raised.partition(": ")
        return key, raised
    if mistake["type"] == "extra_forbidden" and "." not in key and isinstance(mistake["input"], dict):
        key += "".join(f".{name}" for name in list(mistake["input"])[:1])
    return key, _complaint(mistake)


def _complaint(mistake: Any) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind in LIMITS:
        sign, limit = LIMITS[kind]
        demand = f"must be {sign} {plain(context[limit])}"
    elif kind == "literal_error":
        demand = f"must be {context['expected']}"
    else:
        demand = COMPLAINTS.get(kind, mistake["msg"])
    return f"{demand}, got {mistake['input']!r}"


def _suggestion(key: str, known: Sequence[str]) -> str:
    same_name = [name for name in known if name.split(".")[-1] == key.rpartition(".")[2]]
    close = same_name or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
