"""Failures, in three kinds that never mix.

* The caller's fault is an exception that already is a response: it knows its HTTP status, the
  field at fault and the code that agents match (`RequestError` and its children).
* A machine that cannot start is one line naming the file or the flag (`ConfigError`).
* A broken invariant stops the engine loudly (`InvariantBroken`).

A shortage of memory or slots inside the engine is none of these: it is a value, not an exception.
"""

from __future__ import annotations


class TokenSpeedError(Exception):
    """The root of everything this package raises on purpose."""


class ConfigError(TokenSpeedError):
    """The engine cannot start as asked. The message is one line and names the flag, file or field."""


class CheckpointError(ConfigError):
    """A checkpoint is missing, broken or of a kind that is not supported. The message names the file."""


class InvariantBroken(TokenSpeedError):
    """The engine found its own state inconsistent. Never caught to continue: the process ends."""


class RequestError(TokenSpeedError):
    """One request cannot be served. Carries what every front end needs to say so.

    `status` is the HTTP status, `type` and `code` are OpenAI's error fields, `param` names the field of
    the request, `retry_after` is in whole seconds.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """400: a field is missing, malformed, out of range, or has no effect here."""


class ContextLengthExceeded(InvalidRequest):
    """400 with the code and the sentence that coding agents match to compact their history.

    `prompt` and `completion` are tokens asked for; `limit` is the model's context.
    """

    def __init__(self, *, limit: int, prompt: int, completion: int, param: str = "messages") -> None:
        where = "messages" if param == "messages" else "prompt"
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt + completion} tokens ({prompt} in the {where}, {completion} in the completion). "
            f"Please reduce the length of the {where} or completion.",
            param=param,
            code="context_length_exceeded",
        )
        self.limit = limit
        self.prompt = prompt


class ModelNotFound(RequestError):
    """404: the request names a model that this server does not serve."""

    status = 404


class Overloaded(RequestError):
    """429: the engine has no place for this request now, but may have one later. `retry_after` is always set."""

    status = 429
    type = "rate_limit_error"


class QueueFull(Overloaded):
    """Too many requests wait."""


class FloorNotKept(Overloaded):
    """Beside this request a promised floor of tokens per second could not be kept, its own or another's."""


class NoRoom(Overloaded):
    """The KV cache is full of sessions in use, and this request's own would have to wait too long."""


class InternalError(RequestError):
    """500: a defect of this server ended one request. The log has the details, the client does not."""

    status = 500
    type = "internal_error"


class Unavailable(RequestError):
    """503: the engine is loading, draining or dead."""

    status = 503
    type = "service_unavailable_error"
