"""What a client is told in place of an answer: a status, and an error in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastvlm_mlx.errors import FastVLMError, ImageError, OptionError, PromptError

INVALID = "invalid_request_error"


class ApiError(FastVLMError):
    """An answer other than the one that was asked for.

    Attributes:
        status: of HTTP.
        kind, param, code: as OpenAI's errors have them.
        headers: that go with it.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def answer_to(error: BaseException) -> ApiError:
    """What a client is told of an error: its sentence, or of a fault of ours that it is one."""
    if isinstance(error, ApiError):
        return error
    codes = {ImageError: "invalid_image", PromptError: "invalid_prompt", OptionError: None}
    for kind, code in codes.items():
        if isinstance(error, kind):
            return ApiError(str(error), 400, code=code)
    # Of the bundle or this machine, or a bug: nobody else's business.
    logging.getLogger("fastvlm").error("the server failed", exc_info=error)
    return ApiError(
        "the server failed while it computed the answer: its log says why",
        500,
        kind="server_error",
        code="server_error",
    )
