"""`python -m hovit`: the same as the `hovit` command."""

from .cli import main

main()
