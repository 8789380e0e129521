"""The one exception that users see."""


class HovitError(Exception):
    """Bad input or a failed run, in one line: what is wrong, where, what to do.

    The command line prints it without a traceback and exits with 1.
    """


def one_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class OutOfTime(Exception):
    """The deadline has come. What was done is on disk, and the same call goes on from there."""
