"""Calls in a thread: their results, their errors, and that they do not hold up the caller."""

import threading

import pytest
import torch

from flashrl_rollout.background import Background

CPU = torch.device("cpu")


def test_it_runs_beside_the_caller_without_gradients_in_one_thread() -> None:
    go = threading.Event()

    def call() -> tuple[int, bool]:
        assert go.wait(30)
        return threading.get_ident(), torch.is_grad_enabled()

    background = Background(CPU)
    first, second = background.start(call), background.start(call)
    assert not first.done()
    go.set()
    assert first.result() == second.result() == (first.result()[0], False)
    assert first.result()[0] != threading.get_ident()
    assert torch.is_grad_enabled()


def test_an_error_is_raised_where_the_result_is_asked_for_and_ends_nothing() -> None:
    def call() -> None:
        raise ValueError("no such part")

    background = Background(CPU)
    failed, after = background.start(call), background.start(lambda: 3)
    with pytest.raises(ValueError, match="no such part"):
        failed.result()
    assert after.result() == 3
