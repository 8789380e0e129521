"""Exceptions, and help for their messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class HovitError(Exception):
    """Bad input or a failed run, in one line: what is wrong, where, what to do.

    The command line prints it without a traceback and exits with code 1.
    """


def one_line(error: BaseException) -> str:
    """First line of an exception's message, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: object, known: Iterable[str]) -> str:
    """`; nearest: a, b`: the known names most like a wrong one; `''` if none is."""
    found = get_close_matches(str(name), [str(each) for each in known], n=3)
    return f"; nearest: {', '.join(found)}" if found else ""


class OutOfTime(Exception):
    """The deadline has passed. Finished work is on disk, and the same call resumes from there."""
