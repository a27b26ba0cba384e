"""Errors as clients see them: {"error": {"message", "type", "param", "code"}}."""

import re

import msgspec

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    431: "RequestHeaderFieldsTooLargeError",
    499: "ClientClosedRequestError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    error: ErrorBody


class ApiError(Exception):
    """What went wrong, whose fault it was (`status`) and which field (`param`)."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers = dict(headers or {})
        if retry_after is not None:  # seconds, where trying again can help
            self.headers["retry-after"] = str(retry_after)

    def body(self) -> ErrorResponse:
        kind = TYPES.get(self.status, "InternalServerError")
        return ErrorResponse(ErrorBody(self.message, kind, self.param, self.status))


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param)


def unavailable(message: str, retry_after: int | None = None) -> ApiError:
    return ApiError(503, message, retry_after=retry_after)


def not_yet(field: str, instead: str) -> ApiError:
    """A field that exists elsewhere and that this server would otherwise silently ignore."""
    return bad_request(f"`{field}` is not supported by this server; {instead}", field)


_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_MISSING = re.compile(r"required field `(?P<field>[^`]+)`")


def from_validation(error: msgspec.ValidationError) -> ApiError:
    """Name the field that msgspec could not read: "`max_tokens`: expected `int`, got `str`"."""
    text = str(error)
    found = _PATH.search(text)
    path = found["path"] if found else ""
    text = _PATH.sub("", text)
    missing = _MISSING.search(text)
    if missing:
        field = f"{path}.{missing['field']}" if path else missing["field"]
        return bad_request(f"`{field}` is required", field)
    text = text[0].lower() + text[1:]
    return bad_request(f"`{path}`: {text}" if path else text, path or None)
