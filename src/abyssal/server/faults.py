"""Errors of the API, with the status and in the shape that OpenAI's clients understand."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import Response

from abyssal.engine import DrainingError, QueueFullError
from abyssal.errors import AbyssalError, DataError, UsageError
from abyssal.server.json_text import to_json

RETRY_AFTER_S = 1


class ApiError(AbyssalError):
    """A fault of a request: a status, a sentence, and the field and code it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Describe the fault; `param` is a path such as `messages[0].content`."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The fault as a JSON object of OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the fault as a response; one that may be sent again later says when."""
        headers = {}
        if self.status == 503:
            headers["retry-after"] = str(RETRY_AFTER_S)
        elif self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(to_json(self.body), self.status, headers, media_type="application/json")


def fault_of(error: BaseException) -> ApiError:
    """Return the fault to send to the client whose request ended by `error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full")
    if isinstance(error, DrainingError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, UsageError | DataError):
        field = re.match(r"(\w+)[=:]", str(error))
        return ApiError(400, str(error), param=field[1] if field else None)
    if isinstance(error, AbyssalError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, "a defect of the server ended this request; its log says more", code="internal_error")
