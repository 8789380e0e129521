"""`python -m hovit`: the same as the `hovit` command, by the pipeline's worker if there is one."""

import sys

from .pipeline.worker import hand_over

if __name__ == "__main__":  # worker processes of `hovit sweep` import this file too
    code = hand_over(sys.argv[1:])
    if code is None:
        from .cli import main

        main()
    sys.exit(code)
