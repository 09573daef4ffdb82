"""The program ``metahpo``, also as ``python -m metahpo``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs the command line; Ctrl-C ends it in one line while it is still importing, too."""
    # One that is ignored (a background job's Ctrl-C) stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from metahpo.cli import main

    return main()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but ends the program at once where a module is being imported.

    Modules make other errors of it, or print it and go on; and there is nothing to save.
    """
    here = frame
    while here is not None:
        if here.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"metahpo: stopped by SIGINT\n")
            os._exit(128 + signum)
        here = here.f_back
    signal.default_int_handler(signum, frame)


if __name__ == "__main__":
    sys.exit(main())
