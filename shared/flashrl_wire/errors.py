"""The error table: code <-> HTTP status <-> exception.

Knows nothing of HTTP servers or clients; `app` and `rollout_client` turn these into replies and back.
"""

from typing import ClassVar


class WireError(Exception):
    """An expected failure with a stable code, an HTTP status, one line of text and JSON-able facts."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def body(self) -> dict[str, dict[str, object]]:
        """The reply body `{"error": {"code", "message", ...facts}}`."""
        return {"error": {"code": self.code, "message": self.message, **self.facts}}


class MalformedError(WireError):
    """The request could not be read at all."""

    code, status = "malformed", 400


class UnauthorizedError(WireError):
    """No token, or a wrong one."""

    code, status = "unauthorized", 401


class PathNotAllowedError(WireError):
    """A checkpoint path outside the configured roots."""

    code, status = "path_not_allowed", 403


class UnknownTransferError(WireError):
    """A transfer id that was never begun, was aborted or has expired."""

    code, status = "unknown_transfer", 404


class UnknownRouteError(WireError):
    """A path that the service does not have."""

    code, status = "not_found", 404


class MethodNotAllowedError(WireError):
    """A path that the service has, for other methods."""

    code, status = "method_not_allowed", 405


class StaleBaseError(WireError):
    """A delta against a version or digest that the service does not hold."""

    code, status = "stale_base", 409


class VersionNotReachedError(WireError):
    """A request for a newer weight version than the service has."""

    code, status = "version_not_reached", 409


class UpdateInProgressError(WireError):
    """A second transfer while one is under way, or a trainer other than the one being followed."""

    code, status = "update_in_progress", 409


class NotStagedError(WireError):
    """A commit before every chunk has arrived and was verified."""

    code, status = "not_staged", 409


class DrainTimeoutError(WireError):
    """Running sequences did not finish before the deadline of a drain; nothing changed."""

    code, status = "drain_timeout", 409


class TooLargeError(WireError):
    """A declared or real size over a cap."""

    code, status = "too_large", 413


class InvalidFieldError(WireError):
    """A field with a value that cannot be honoured."""

    code, status = "invalid_field", 422


class BadUpdateError(WireError):
    """An update whose manifest or content is wrong; nothing changed."""

    code, status = "bad_update", 422


class DigestMismatchError(WireError):
    """The written weights have another digest than the trainer declared; the old ones are back."""

    code, status = "digest_mismatch", 422


class QueueFullError(WireError):
    """More requests are waiting than the service accepts."""

    code, status = "queue_full", 429


class EngineFailedError(WireError):
    """The engine could not do what it was asked; its weights are what they were."""

    code, status = "engine_failed", 500


class NotReadyError(WireError):
    """Starting, stopping, paused for too long or poisoned."""

    code, status = "not_ready", 503


class TimedOutError(WireError):
    """A request took longer than the service allows; nothing of it is kept."""

    code, status = "timed_out", 503


ERRORS: dict[str, type[WireError]] = {error.code: error for error in WireError.__subclasses__()}
"""Every code and its exception."""


def from_body(status: int, body: object) -> WireError:
    """The exception for a reply with `status` and a decoded JSON `body`; a plain WireError for an unknown code."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return WireError(f"HTTP {status}: {str(body)[:200]}")
    facts = {str(key): value for key, value in error.items() if key not in ("code", "message")}
    kind = ERRORS.get(str(error.get("code")), WireError)
    return kind(str(error.get("message", f"HTTP {status}")), **facts)
