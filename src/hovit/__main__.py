"""`python -m hovit`: the same as the `hovit` command, by the pipeline's worker if there is one."""

import sys

from .pipeline.worker import hand_over

code = hand_over(sys.argv[1:])
if code is None:
    from .cli import main

    main()
sys.exit(code)
