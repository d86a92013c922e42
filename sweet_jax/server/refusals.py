"""The HTTP status and the message of each error that a request can end with."""

from collections.abc import Mapping
from typing import NamedTuple

from starlette.requests import ClientDisconnect

from sweet_jax.errors import UserError
from sweet_jax.server.worker import QueueFullError, WorkerStoppedError


class RefusedError(Exception):
    """Raised for a request that is refused.

    Attributes:
      status: HTTP status.
      error_type: error type of text-embeddings-inference, see `Refusal`.

    """

    def __init__(self, status: int, message: str, error_type: str = "Validation"):
        super().__init__(message)
        self.status, self.error_type = status, error_type


class Refusal(NamedTuple):
    """Describes a refused request.

    Attributes:
      status: HTTP status, in sweet_jax's own format.
      message: error message for the client.
      error_type: error type in text-embeddings-inference's format: "Validation", "Empty",
        "Overloaded" or "Backend".
      headers: headers of the response.

    """

    status: int
    message: str
    error_type: str
    headers: Mapping[str, str] | None = None


def make_refusal(error: Exception, timeout: float) -> Refusal:
    """Returns the refusal for an exception; reraises an exception that is a bug.

    Args:
      error: the exception.
      timeout: number of seconds within which a request must be answered.

    """
    match error:
        case RefusedError():
            # The unread rest of the body would be parsed as the next request.
            close = {"Connection": "close"} if error.status in (408, 413) else None
            return Refusal(error.status, str(error), error.error_type, close)
        case UserError():
            return Refusal(400, str(error), "Validation")
        case QueueFullError():
            message = "too many texts are waiting: try again later"
            return Refusal(503, message, "Overloaded", {"Retry-After": "1"})
        case WorkerStoppedError():
            return Refusal(503, "the server cannot compute any more", "Backend")
        case TimeoutError():
            return Refusal(504, f"not answered within {timeout:g} seconds", "Overloaded")
        case ClientDisconnect():
            return Refusal(400, "the connection was closed", "Validation")
    raise error
