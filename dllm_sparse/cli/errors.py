"""The one error boundary: exception -> message on stderr and exit code. Usage 2, failure 1, Ctrl-C 130."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from dllm_sparse.cli.terminal import printable
from dllm_sparse.types import DllmSparseError, StdoutNotWritten


def run(app: Callable[..., object]) -> int:
    """Runs the app and returns the exit code. DLLM_SPARSE_DEBUG=1 prints tracebacks above the messages."""
    code = _exit_code(app)
    try:
        sys.stdout.flush()  # here, or a reader that left is noticed too late to be handled
    except OSError as error:
        # Python flushes once more when it ends, and must not complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0 and not isinstance(error, BrokenPipeError):
            _say(f"error: {StdoutNotWritten(error)}")
        return code or 1
    return code


def _exit_code(app: Callable[..., object]) -> int:
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if code == 130:  # typer turns Ctrl-C into an exit of its own
            _say("interrupted")
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        return 1  # the reader of our output left (`| head`): nothing to shout about
    except Exception as error:  # noqa: BLE001 (the boundary: whatever went wrong ends as words and an exit code)
        if os.environ.get("DLLM_SPARSE_DEBUG"):
            _say("".join(traceback.format_exception(error)).rstrip())
        message, code = explain(error)
        _say(message)
        return code
    return 0


def explain(error: Exception) -> tuple[str, int]:
    """The message a user gets for an exception, and the exit code."""
    if isinstance(error, DllmSparseError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError):
        return f"error: {error}", 1
    hint = "set DLLM_SPARSE_DEBUG=1 for the traceback and please report it"
    return f"unexpected {type(error).__name__}: {error}\n{hint}", 1


def _say(message: str) -> None:
    print(printable(message), file=sys.stderr)  # noqa: T201 (the boundary must work when rich cannot be imported)
