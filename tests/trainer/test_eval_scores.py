"""Accuracy, pass@k and intervals by numbers worked by hand. Knows nothing of sampling."""

import itertools

import pytest

from flashrl_trainer.eval_scores import EvalScores, estimate, pass_at_k, wilson_interval

# three problems of four samples: two, none and one of them right
SCORES = EvalScores([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], [1.0, 0.0, 0.0])


def test_pass_at_k_by_hand() -> None:
    # of the 6 pairs among 4 samples, 1 misses both right ones; with a single right one 3 of 6 miss it
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    assert (pass_at_k(4, 0, 3), pass_at_k(4, 4, 1), pass_at_k(4, 1, 4)) == (0.0, 1.0, 1.0)
    assert SCORES.pass_at(1).value == pytest.approx((1 / 2 + 0 + 1 / 4) / 3)
    assert SCORES.pass_at(2).value == pytest.approx((5 / 6 + 0 + 1 / 2) / 3)
    assert SCORES.pass_at(4).value == pytest.approx(2 / 3)


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(right: int, k: int) -> None:
    choices = list(itertools.combinations([True] * right + [False] * (5 - right), k))
    assert pass_at_k(5, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_graded_rewards_count_in_the_mean_and_only_whole_ones_as_solved() -> None:
    scores = EvalScores([[0.5, 1.0], [0.9, -1.0]], None)
    assert scores.accuracy == pytest.approx(0.35)
    assert scores.pass_at(2).value == pytest.approx(0.5)


def test_metrics_have_the_interval_beside_the_mean() -> None:
    assert SCORES.metrics() == {
        "eval/accuracy": pytest.approx(0.25),
        "eval/accuracy_low": 0.0,
        "eval/accuracy_high": 0.5,  # three problems: the bootstrap reaches from all of the worst to all of the best
        "eval/greedy": pytest.approx(1 / 3),
        "eval/samples": 12,
    }
    assert EvalScores([[1.0]], None).metrics()["eval/greedy"] is None


def test_the_interval_of_single_answers_is_wilsons() -> None:
    # z^2 = 3.8415; 0.5 of 100: 0.5 +- 1.96 / 1.0384 x sqrt(0.0025 + 0.000096); 0 of 10: up to 0.38415 / 1.38415
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert estimate([1.0] * 50 + [0.0] * 50).interval == wilson_interval(0.5, 100)


def test_samples_of_one_problem_are_not_counted_as_many_problems() -> None:
    """100 problems, each solved by a half, or half of them always: the same mean, and what is known differs."""
    alike, split = [[1.0, 0.0]] * 100, [[1.0, 1.0]] * 50 + [[0.0, 0.0]] * 50
    low, high = EvalScores(split, None).mean().interval
    assert (low, high) == wilson_interval(0.5, 100)
    assert EvalScores(alike, None).mean().interval == (0.5, 0.5)


def test_the_bootstrap_agrees_with_the_normal_approximation_where_that_holds() -> None:
    values = [0.0, 0.25, 0.5, 1.0] * 100  # standard deviation 0.3698, over 400 problems: 1.96 x 0.01849 = 0.03624
    found = estimate(values)
    assert found.value == pytest.approx(0.4375)
    assert found.interval == pytest.approx((0.4013, 0.4737), abs=0.004)
    assert estimate(values) == found, "the same every time"


def test_an_estimate_reads_well() -> None:
    assert str(estimate([1.0] * 50 + [0.0] * 50)) == "50.0% (40.4% to 59.6%)"
