"""A call in a thread: its result, its error, and that it does not hold up the caller."""

import threading

import pytest
import torch

from flashrl_rollout.background import Background

CPU = torch.device("cpu")


def test_it_runs_beside_the_caller_without_gradients() -> None:
    go = threading.Event()

    def call() -> tuple[str, bool]:
        assert go.wait(30)
        return threading.current_thread().name, torch.is_grad_enabled()

    background = Background(CPU, call)
    assert not background.is_done
    go.set()
    assert background.result() == ("flashrl-ahead", False)
    assert background.is_done


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def call() -> None:
        raise ValueError("no such part")

    background = Background(CPU, call)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such part"):
            background.result()
