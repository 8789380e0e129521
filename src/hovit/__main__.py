"""`python -m hovit`: the same as the `hovit` command, by the pipeline's worker if there is one."""

import gc
import sys


def main() -> None:
    """Run the command line. `pip install hovit` alone installs the models without it."""
    gc.set_threshold(10_000)  # importing torch and timm takes a quarter less CPU time
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hovit"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}: run `make setup` in a clone, "
            "or install the extra: `pip install '.[artifact]'`"
        )
    run()


if __name__ == "__main__":  # worker processes of `hovit sweep` import this file too
    from .pipeline.worker import hand_over

    code = hand_over(sys.argv[1:])
    if code is None:
        main()
    sys.exit(code)
