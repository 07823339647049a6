"""The one family of errors a user can meet. Each message says what was found,
what was expected and what to do, in one sentence; the command line prints it as
it is and exits with `exit_status`."""


class FastVLMError(Exception):
    """Base of every error raised on purpose by fastvlm_mlx and model_export."""

    exit_status = 2


class ConfigError(FastVLMError):
    """A configuration that is missing a key, contradicts itself or is not FastVLM's."""


class CheckpointError(FastVLMError):
    """A source checkpoint that can't be read, or whose tensors are not what its config says."""


class OptionError(FastVLMError):
    """An option, or a combination of options, that can't be honoured."""


class BundleError(FastVLMError):
    """A bundle that is incomplete, changed since export, or in a layout we don't know."""


class ImageError(FastVLMError):
    """A picture that can't be read, or that is larger than the limit."""


class PromptError(FastVLMError):
    """A prompt that is empty or does not fit the context."""


class EncoderError(FastVLMError):
    """An encoder package that can't be evaluated on this machine."""


class GateError(FastVLMError):
    """A numeric gate that the export did not pass."""


class DestinationError(FastVLMError):
    """A destination that exists, or that can't be written."""
