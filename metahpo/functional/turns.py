"""Threads of one process take turns: what they share is changed for a moment while a learner runs."""

from __future__ import annotations

import os
import threading
from contextlib import ContextDecorator


class Turn(ContextDecorator):
    """A lock that threads get in the order in which they ask for it, and that its holder may take again.

    Whoever runs a learner, or draws from generators that were seeded, holds ``TURN``: parameters and buffers stand in a
    net's attributes only for the moment of a call, and torch's generators are one for all threads. As a decorator, it
    is held during each call of the function.
    """

    def __init__(self) -> None:
        self._next, self._free = threading.Lock(), threading.Lock()
        self._holder: int | None = None
        self._depth = 0
        self._thread = threading.local()

    @property
    def helping(self) -> bool:
        """Whether ``help`` was called in this thread."""
        return getattr(self._thread, "helping", False)

    def help(self) -> None:
        """From now on this thread works, on copies of its own, for the thread that holds the turn, and takes none."""
        self._thread.helping = True

    def __enter__(self) -> Turn:
        if self.helping:
            return self
        me = threading.get_ident()
        if self._holder != me:
            # One at a time waits for the lock; else the holder would take it again before another woke up.
            with self._next:
                self._free.acquire()
            self._holder = me
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        if self.helping:
            return
        self._depth -= 1
        if not self._depth:
            self._holder = None
            self._free.release()

    def after_fork(self) -> None:
        """In the child: the threads that waited are not there."""
        self._next = threading.Lock()
        self.__exit__()


TURN = Turn()
# A child begins with nets that have their own tensors.
os.register_at_fork(before=TURN.__enter__, after_in_parent=TURN.__exit__, after_in_child=TURN.after_fork)
