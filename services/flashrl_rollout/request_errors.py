"""What is wrong with a request, in one line that names the field.

Knows the shape of pydantic's and starlette's complaints; knows nothing of routes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flashrl_wire.errors import InvalidFieldError, MalformedError, MethodNotAllowedError, UnknownRouteError, WireError


def invalid_request(errors: Sequence[Mapping[str, Any]], content_type: str) -> WireError:
    """MalformedError for a body that is no JSON, else InvalidFieldError about the most specific complaint."""
    if any(error["type"] == "json_invalid" for error in errors):
        return MalformedError("the body is not JSON")
    if content_type and "json" not in content_type:  # what curl -d sends is taken for text
        return MalformedError(f"the body is declared as {content_type}, not as application/json")
    # a value that fits no member of a union has a complaint a member; the deepest is the member that was meant
    worst = max(errors, key=lambda error: len(error["loc"]))
    field = _field(worst["loc"])
    return InvalidFieldError(f"{field}: {worst['msg'].removeprefix('Value error, ')}", field=field)


def _field(location: Sequence[str | int]) -> str:
    """`("body", "prompts", 0, "list[constrained-int]", 2)` -> `prompts.0.2`: union members are no fields."""
    names = [str(part) for part in location[1:] if part != "str" and "[" not in str(part)]
    return ".".join(names) or "body"


def http_error(status: int, method: str, path: str) -> WireError:
    """The error behind a status that the framework itself answers with."""
    match status:
        case 404:
            return UnknownRouteError(f"{path} is no route of this service")
        case 405:
            return MethodNotAllowedError(f"{path} does not take {method}")
        case _:
            return MalformedError("the body could not be read")
