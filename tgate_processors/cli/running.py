"""Run a command, and print its errors and warnings as one line that names options."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence

from tgate_processors.cli.options import parser
from tgate_processors.errors import TGateError, UnsupportedPipelineError
from tgate_processors.measure.interruption import INTERRUPTED


# options whose names differ from those of the Python arguments
RENAMED = {"num_inference_steps": "steps", "guidance": "guidance_scale", "pipe": "model"}
WORDS = ("prompt", "prompts", "text")  # Python arguments that the command takes as `PROMPT`


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code. If nothing is done yet, Ctrl-C raises `KeyboardInterrupt`."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", options)
            code = _run(options)
    except (UnsupportedPipelineError, ValueError) as error:
        _say(str(error), options)
        return 2
    except (TGateError, OSError) as error:
        _say(str(error), options)
        return 1
    if code == INTERRUPTED:
        _say("interrupted: the report covers what was done until then", options)
    return code


def _run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about packages that nothing here needs
    from tgate_processors.cli import commands  # here, because a help text must not wait for diffusers' pipelines

    if not sys.stderr.isatty():
        commands.disable_loading_bars()
    code: int = getattr(commands, f"run_{options.command}")(options)
    return code


def _say(message: str, options: argparse.Namespace) -> None:
    """Print a message on standard error, as one line."""
    line = re.sub(r"\s*\n\s*", " ", _in_options(message, options))
    print(f"tgate-processors {options.command}: {line}", file=sys.stderr)


def _in_options(message: str, options: argparse.Namespace) -> str:
    """Return the message of a Python call with the command's options in the place of its arguments."""

    def option(argument: re.Match[str]) -> str:
        name = RENAMED.get(argument[1], argument[1])
        if name in WORDS:
            return "`PROMPT"
        return f"`--{name.replace('_', '-')}" if name in vars(options) else argument[0]

    return re.sub(r"`(\w+)(?:=True)?(?=[`=])", option, message)
