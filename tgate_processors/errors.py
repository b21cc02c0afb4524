"""Errors of this library. Each is a `TGateError` and also the builtin error that a caller would expect."""


class TGateError(Exception):
    """Base class of all errors of this library."""


class ConfigError(TGateError, ValueError):
    """An argument has a value that is not allowed."""


class UnsupportedPipelineError(TGateError, TypeError):
    """The pipeline or denoiser cannot be gated."""


class StateError(TGateError, RuntimeError):
    """A call came at the wrong time, such as a second `apply_tgate`, or a step without its evaluation."""


class MissingPackageError(TGateError, ImportError):
    """An optional package is needed and not installed."""
