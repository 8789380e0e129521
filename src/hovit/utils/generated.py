"""Parts of text files that a command writes, between two lines that mark them."""

from pathlib import Path

from .errors import HovitError


def marks(part: str, command: str) -> tuple[str, str]:
    """The lines before and after a part, such as `findings` made by `hovit readme`."""
    return f"<!-- {part}: made by `{command}` -->\n", f"<!-- end of {part} -->\n"


def around(text: str, part: str, command: str, file: Path) -> tuple[str, str]:
    """The text before and after a part, each with its mark.

    Args:
        text: content of the file.
        part: name of the part.
        command: the command that writes it.
        file: for the message.

    Raises:
        HovitError: if a mark is missing or occurs twice.
    """
    begin, end = marks(part, command)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise HovitError(f"{file}: needs the lines {begin.strip()} and {end.strip()} once")
    return text.split(begin)[0] + begin, end + text.split(end)[1]
