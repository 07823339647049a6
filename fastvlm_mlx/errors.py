"""The one family of errors a user can meet. Each message says what was found,
what was expected and what to do, in one sentence; the command line prints it as
it is and exits with `exit_status`."""

from __future__ import annotations

# What a terminal shows of a message is about this much at a time.
MAX_CHARACTERS = 1_000


class FastVLMError(Exception):
    """Base of every error raised on purpose by fastvlm_mlx and model_export.

    Its text is one line that is safe to print, whatever name, key or value of somebody's file
    stands in it.
    """

    exit_status = 2

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(FastVLMError):
    """A configuration that is missing a key, contradicts itself or is not FastVLM's."""


class CheckpointError(FastVLMError):
    """A source checkpoint that can't be read, or whose tensors are not what its config says."""


class HubUnreachableError(CheckpointError):
    """A model on the hub, which gives no answer or is not to be asked."""


class OptionError(FastVLMError):
    """An option, or a combination of options, that can't be honoured."""


class BundleError(FastVLMError):
    """A bundle that is incomplete, changed since export, or in a layout we don't know."""


class ImageError(FastVLMError):
    """An image that can't be read, or that is larger than the limit."""


class PromptError(FastVLMError):
    """A prompt that is empty or does not fit the context."""


class EncoderError(FastVLMError):
    """An encoder package that can't be evaluated on this machine."""


class GateError(FastVLMError):
    """A numeric gate that the export did not pass.

    Attributes:
        failed: the gates that failed, with their figures and limits; empty if none is one of them.
    """

    def __init__(self, text: str, failed: str = ""):
        super().__init__(text)
        self.failed = failed


class DestinationError(FastVLMError):
    """A destination that exists, or that can't be written."""


def printable(text: object, limit: int = MAX_CHARACTERS) -> str:
    """Somebody's text on one line, of at most `limit` characters.

    Control characters, terminal escapes, marks that turn the direction of writing, line separators
    and halves of surrogate pairs are written as Python escapes them. The middle of a longer text is
    left out, since its beginning says what it is and its end what to do.
    """
    shown = escaped(" ".join(str(text).split()))
    if len(shown) <= limit:
        return shown
    half = (limit - 1) // 2
    return f"{shown[:half]}…{shown[-half:]}"


def escaped(text: object) -> str:
    """Somebody's text with what can't be printed, line ends too, as Python escapes it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
