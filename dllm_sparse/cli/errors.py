"""The one error boundary: exception -> message on stderr and exit code. Usage 2, failure 1, Ctrl-C 130."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dllm_sparse.types import DllmSparseError


def run(app: Callable[..., object]) -> int:
    """Runs the app and returns the exit code. DLLM_SPARSE_DEBUG=1 lets tracebacks through."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, or a reader that left is noticed too late to be handled
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if code == 130:  # typer turns Ctrl-C into an exit of its own
            _say("interrupted")
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`): not an error, but Python must not complain while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the boundary: whatever went wrong ends as one line and an exit code
        if os.environ.get("DLLM_SPARSE_DEBUG"):
            raise
        message, code = explain(error)
        _say(message)
        return code
    return 0


def explain(error: Exception) -> tuple[str, int]:
    """The message a user gets for an exception, and the exit code."""
    if isinstance(error, DllmSparseError):
        return f"error: {error}", error.exit_code
    if _is_out_of_memory(error):
        first = str(error).strip().splitlines()[0]
        advice = "lower --gen-length, --batch-size or --batch-tokens (where there is one) or use --dtype bfloat16"
        return f"error: out of memory ({first}); {advice}", 1
    if isinstance(error, OSError):
        return f"error: {error}", 1
    hint = "set DLLM_SPARSE_DEBUG=1 for the traceback and please report it"
    return f"unexpected {type(error).__name__}: {error}\n{hint}", 1


def _is_out_of_memory(error: Exception) -> bool:
    named = type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, MemoryError) or "allocate memory" in str(error)


def _say(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201 (the boundary must work when rich cannot be imported)
