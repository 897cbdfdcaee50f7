"""The benchmark asks the service as the trainer does."""

from flashrl_rollout.bench.settings import TRAINER_PROMPTS, read_settings
from flashrl_trainer.collect import PROMPTS_PER_REQUEST


def test_requests_have_as_many_prompts_as_the_trainers_where_lengths_are_equal() -> None:
    assert read_settings(shape="tiny").prompts_in_request == TRAINER_PROMPTS == PROMPTS_PER_REQUEST
    assert read_settings(shape="tiny", prompts_per_request=3).prompts_in_request == 3
    assert read_settings(shape="tiny", lengths="lognormal").prompts_in_request == 1
