"""Plurals."""


def plural(n: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{n} {noun}{'s' * (n != 1)}"
