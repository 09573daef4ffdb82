"""The program ``metahpo``, also as ``python -m metahpo``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

STOPPED = b"metahpo: stopped by SIGINT\n"


def main() -> int:
    """Runs the command line; Ctrl-C ends it in one line at any moment, while it is importing too."""
    interrupts = Interrupts()
    # One that is ignored (a background job's Ctrl-C) stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupts.note)
    from metahpo.cli import main

    try:
        return main()
    except Exception:
        # Libraries in C make errors of their own of a KeyboardInterrupt.
        if not interrupts.noted:
            raise
        os.write(2, STOPPED)
        return 128 + signal.SIGINT


class Interrupts:
    """What Ctrl-C does until a command has its own way; noted: whether it came."""

    def __init__(self) -> None:
        self.noted = False

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, but ends the program at once where a module is being imported.

        Modules make other errors of it, or print it and go on; and there is nothing to save.
        """
        self.noted = True
        here = frame
        while here is not None:
            if here.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, STOPPED)
                os._exit(128 + signum)
            here = here.f_back
        signal.default_int_handler(signum, frame)


if __name__ == "__main__":
    sys.exit(main())
