"""A prefetched minibatch is the one that would have been made."""

from __future__ import annotations

import pytest
import torch

from vdu_fast.prefetch import Prefetcher


class _Batches:
    """Minibatch `step` holds `step`; which were made is kept."""

    def __init__(self):
        self.made = []

    def __call__(self, step):
        self.made.append(step)
        return torch.full((3,), float(step)), torch.tensor([step])


def test_on_the_cpu_a_batch_is_made_when_it_is_asked_for():
    batches = _Batches()
    prefetcher = Prefetcher(batches, torch.device("cpu"))
    for step in (0, 1, 5, 5):
        values, number = prefetcher(step)
        assert values.tolist() == [step] * 3
        assert number.tolist() == [step]
    assert batches.made == [0, 1, 5, 5]
    prefetcher.close()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A prefetcher that believes in a GPU, with the transfers left out."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_args, **_options: self)
    return torch.device("cuda")


def test_the_next_batch_is_made_ahead_and_a_jump_is_served(as_on_a_gpu):
    batches = _Batches()
    prefetcher = Prefetcher(batches, as_on_a_gpu)
    assert [prefetcher(step)[1].item() for step in (0, 1, 2, 7, 8)] == [0, 1, 2, 7, 8]
    prefetcher.close()
    # After every batch the one behind it, each once, in whatever order the two threads come to it: 3 is made in vain
    # when 7 is asked for, and 9 may be under way or not begun.
    assert sorted(set(batches.made) - {3, 9}) == sorted(step for step in batches.made if step not in (3, 9))
    assert {0, 1, 2, 7, 8} <= set(batches.made) <= {0, 1, 2, 3, 7, 8, 9}
    assert prefetcher(4)[1].item() == 4


def test_a_failure_ahead_comes_out_where_the_batch_is_asked_for(as_on_a_gpu):
    def broken(step):
        if step == 1:
            raise ValueError("no such batch")
        return (torch.tensor([step]),)

    prefetcher = Prefetcher(broken, as_on_a_gpu)
    prefetcher(0)
    with pytest.raises(ValueError, match="no such batch"):
        prefetcher(1)
    prefetcher.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_gpu():
    batches = _Batches()
    prefetcher = Prefetcher(batches, torch.device("cuda"))
    for step in range(5):
        values, _ = prefetcher(step)
        assert values.is_cuda
        assert values.tolist() == [step] * 3
    prefetcher.close()
