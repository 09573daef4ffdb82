from __future__ import annotations

import threading

import pytest
import torch

from metahpo.tasks import Sinusoid
from metahpo.training.prefetch import batches_of, one_ahead


def test_the_next_is_made_while_the_current_one_is_used():
    made = [threading.Event() for _ in range(4)]

    def make(number: int) -> int:
        made[number].set()
        return number * number

    results = []
    for result in one_ahead(make, range(4)):
        if len(results) < 3:
            assert made[len(results) + 1].wait(10), "not made ahead"
        if len(results) < 2:
            assert not made[len(results) + 2].is_set(), "made two ahead"
        results.append(result)
    assert results == [0, 1, 4, 9]
    assert list(one_ahead(make, [])) == []


def test_an_error_is_raised_at_its_own_item():
    def make(number: int) -> int:
        if number == 2:
            raise IndexError(f"no task {number}")
        return number

    items = one_ahead(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(IndexError, match="no task 2"):
        next(items)


@pytest.mark.parametrize("leave", ["close", "raise"])
def test_the_thread_ends_with_its_user(leave):
    before = set(threading.enumerate())
    items = one_ahead(lambda number: number, range(100))
    next(items)
    assert set(threading.enumerate()) - before, "no thread was started"
    if leave == "close":
        items.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            items.throw(KeyboardInterrupt())
    assert not set(threading.enumerate()) - before


def test_batches_are_the_sources_own():
    source, numbers = Sinusoid(), [range(0, 3), range(3, 5)]
    found = list(batches_of(source, numbers, torch.device("cpu")))
    assert [pair[0] for pair in found] == numbers
    for batch, tasks in found:
        torch.testing.assert_close(tasks, source.batch(batch), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_batches_are_the_same_and_on_the_device():
    source, device = Sinusoid(shots=1000), torch.device("cuda")
    numbers = [range(8 * i, 8 * i + 8) for i in range(50)]
    for batch, tasks in batches_of(source, numbers, device):
        assert all(tensor.is_cuda for tensor in tasks)
        torch.testing.assert_close(tasks.to("cpu"), source.batch(batch), rtol=0, atol=0)
