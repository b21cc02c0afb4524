"""Rules that several arguments share."""

from tgate_processors.errors import ConfigError


def require_whole(name: str, value: object, *, least: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"`{name}` must be a whole number of at least {least}, got {value!r}. "
            f"Pass an int, for example `{name}={max(least, 1)}`."
        )


def require_tolerance(value: object) -> None:
    """Raise `ConfigError` unless `value` is a number between 0 and 1."""
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConfigError(f"`tolerance` must be a number between 0 and 1, got {value!r}. Pass for example 0.09.")
