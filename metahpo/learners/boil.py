"""BOIL: body only update in the inner loop."""

from __future__ import annotations

from metahpo.learners.anil import head_of
from metahpo.learners.maml import MAML


class BOIL(MAML):
    """Adapts all but the head, which stays as the outer loop learnt it: features change within a task, and not what the
    head makes of them (Oh et al. 2021, section 3).

    Arguments as in ``MAML``; the head is that of ``ANIL``.
    """

    def adapted_names(self) -> list[str]:
        names = super().adapted_names()
        head = head_of(names)
        return [name for name in names if name not in head]
