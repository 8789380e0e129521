"""Exceptions."""


class HovitError(Exception):
    """Bad input or a failed run, in one line: what is wrong, where, what to do.

    The command line prints it without a traceback and exits with code 1.
    """


def one_line(error: BaseException) -> str:
    """First line of an exception's message, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class OutOfTime(Exception):
    """The deadline has passed. Finished work is on disk, and the same call resumes from there."""
