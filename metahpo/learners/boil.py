"""BOIL: body only update in the inner loop."""

from __future__ import annotations

from metahpo.learners.anil import HeadMAML


class BOIL(HeadMAML):
    """Adapts all but the head, which stays as the outer loop learnt it: features change within a task, and not what the
    head makes of them (Oh et al. 2021, section 3).

    Arguments as in ``MAML``; the head is that of ``ANIL``, and so is ``head``.
    """

    def adapted_names(self) -> list[str]:
        head = self.head_names()
        return [name for name in super().adapted_names() if name not in head]
