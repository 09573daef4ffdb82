"""Ctrl-C and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import signal
import sys
import threading

from metahpo import torchrun


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, everything saved; ``signum`` is the signal that asked."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupts:
    """Inside ``with``, SIGINT and SIGTERM only set ``signum``; a second one acts as if this were not here.

    Python lets only the main thread handle signals: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                # One that is ignored (a background job's Ctrl-C) stays so; None is a handler that is not Python's.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        self._restore()
        if torchrun.rank() == 0:
            print("\nstopping after this step; once more stops at once, without saving", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous.clear()
