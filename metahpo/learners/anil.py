"""ANIL: almost no inner loop."""

from __future__ import annotations

from collections.abc import Sequence

from metahpo.learners.maml import MAML


class ANIL(MAML):
    """Adapts the head alone, w_head <- w_head - lr * gradient; the body is learnt by the outer loop and stays as it is
    within a task (Raghu et al. 2020, section 4).

    Arguments as in ``MAML``. The head is the last layer of the net that has parameters to adapt, in the order in which
    the net registers its layers.
    """

    def adapted_names(self) -> list[str]:
        return head_of(super().adapted_names())


def head_of(names: Sequence[str]) -> list[str]:
    """Those of the parameters that belong to the layer of the last one."""
    return [name for name in names if name.rpartition(".")[0] == names[-1].rpartition(".")[0]]
