"""Whose fault it was: what a request brings along may fail in any way, and ends that request alone."""

from __future__ import annotations

from abyssal.errors import AbyssalError


class RequestFailedError(AbyssalError):
    """Something that a request brought along failed, such as the constraint on its tokens."""


def request_fault(error: BaseException) -> AbyssalError:
    """Return the error that ends a request whose own code raised `error`.

    Whatever that is: a panic of a native library is no `Exception`. Only KeyboardInterrupt and SystemExit, which ask
    the process to end, are raised again.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    if isinstance(error, AbyssalError):
        return error
    failed = RequestFailedError(f"what this request asks of its tokens failed ({type(error).__name__}: {error})")
    failed.__cause__ = error
    return failed
