"""What torchrun tells each process that it starts; nothing here imports torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def rank() -> int:
    """This process's number among all of the run; 0 without torchrun."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int | None:
    """This process's number on its machine; None without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else None
