"""What every arm is asked in a round: prompts of random token ids, and how long each answer is.

Knows numbers; knows nothing of models, processes or who answers.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from flashrl_rollout.bench.settings import BenchSettings

LONGEST_LOGNORMAL = 4096
_WARM_UP_TOKENS = 64
_SIGMA = 1.0  # the mean is then 1.65 medians, and one answer in a hundred ten times as long as the median


@dataclass(frozen=True)
class Workload:
    """Sample j of prompt i is drawn with `seed + i * samples + j` (None: no seeds) and has `max_tokens[i]` tokens."""

    prompts: list[list[int]]
    max_tokens: list[int]
    samples: int
    seed: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens that an arm draws."""
        return sum(self.max_tokens) * self.samples

    def prompt_seed(self, index: int) -> int | None:
        """The seed of the first sample of a prompt."""
        return None if self.seed is None else self.seed + index * self.samples

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)


def make_workload(settings: BenchSettings, vocab_size: int, turn: int) -> Workload:
    """The workload of a round, the same for every arm; round 0 warms up and has short answers.

    Each round has prompts of its own, so that no cached prefix of an earlier round saves work; the lengths are those
    of every other round.
    """
    draw = random.Random(f"{settings.seed}/{turn}")
    prompts = [[draw.randrange(vocab_size) for _ in range(settings.prompt_tokens)] for _ in range(settings.num_prompts)]
    seed = settings.seed + turn * settings.requests if settings.seeded else None
    lengths = response_lengths(settings)
    if not turn:
        lengths = [min(length, _WARM_UP_TOKENS) for length in lengths]
    return Workload(prompts, lengths, settings.samples, seed)


def response_lengths(settings: BenchSettings) -> list[int]:
    """Tokens of the answers to each prompt: `tokens`, or lognormal with that median, up to 4096."""
    if settings.lengths == "fixed":
        return [settings.tokens] * settings.num_prompts
    draw = random.Random(settings.seed)
    drawn = (draw.lognormvariate(math.log(settings.tokens), _SIGMA) for _ in range(settings.num_prompts))
    return [min(max(1, round(length)), LONGEST_LOGNORMAL) for length in drawn]
