"""Model FLOPs, worked by hand."""

import pytest

from flashrl_trainer.flops import (
    ModelSize,
    forward_flops,
    peak_flops,
    training_flops,
    training_flops_per_token,
)

# hidden 8, 2 heads of 4, MLP of 16, 3 layers: a block has 4 x 8 x 8 + 3 x 8 x 16 = 640 elements; a head of 10 x 8
SIZE = ModelSize(block_elements=3 * 640, head_elements=80, attention_width=3 * 8)


def test_a_forward_by_hand() -> None:
    blocks = 2 * 1920 * 5  # five tokens
    attention = 4 * 24 * (6 + 3)  # of three tokens see 1, 2 and 3; of two see 1 and 2
    head = 2 * 80 * 4  # at four tokens
    assert forward_flops(SIZE, [3, 2], 4) == blocks + attention + head == 20_704


def test_training_is_three_forwards() -> None:
    assert training_flops(SIZE, [3, 2], 4) == 62_112


def test_a_token_is_six_flops_an_element_and_half_its_context() -> None:
    # (length + 1) / 2 tokens are seen on average
    assert training_flops_per_token(SIZE, 9) == 6 * (1920 + 80) + 12 * 24 * 5


def test_packing_does_not_make_documents_see_each_other() -> None:
    assert forward_flops(SIZE, [4, 4], 0) == 2 * forward_flops(SIZE, [4], 0) < forward_flops(SIZE, [8], 0)


def test_a_shared_prompt_goes_through_the_matrices_once() -> None:
    assert forward_flops(SIZE, [4, 4], 0, 3) == forward_flops(SIZE, [4, 4], 0) - 2 * 1920 * 3


def test_only_known_cards_have_a_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16", 8) == pytest.approx(8 * 989.4e12)
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32", 1) is None
    assert peak_flops("NVIDIA GeForce RTX 4090", "bfloat16", 1) is None
    assert peak_flops("cpu", "bfloat16", 1) is None
