"""What a client did wrong, in the shape in which OpenAI's API tells it."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not answered. ``status`` is HTTP's; the message says what, where and the way out."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
