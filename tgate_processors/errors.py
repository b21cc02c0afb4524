"""What this library raises. Every error is a `TGateError` and also the builtin that a caller would expect."""


class TGateError(Exception):
    """Base class of all errors of this library."""


class ConfigError(TGateError, ValueError):
    """An argument breaks its rule."""


class UnsupportedPipelineError(TGateError, TypeError):
    """The pipeline or denoiser has nothing that can be gated."""


class StateError(TGateError, RuntimeError):
    """A call came at the wrong time: applied twice, not advanced, asked for a summary before a run."""


class MissingPackageError(TGateError, ImportError):
    """An optional package is asked for and not installed."""
