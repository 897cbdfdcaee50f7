"""A random batch of log-probs and rewards that other implementations can be given too: standard library only.

Knows numbers and shapes; knows nothing of what is computed from them.
"""

from dataclasses import dataclass
from random import Random

LENGTHS = (7, 12, 1, 9, 4, 12, 2, 10)  # response tokens
GROUPS = (0, 0, 0, 0, 1, 1, 1, 1)
REWARDS = (1.0, 0.0, -0.5, 0.0, 0.0, 1.0, 1.0, 0.25)
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, CAP = 0.2, 0.28, 3.0, 2.0  # a dual clip that some tokens meet
TOKEN_BAND, SAMPLE_BAND = (0.5, 2.0), (0.8, 1.25)


@dataclass(frozen=True)
class Response:
    """Log-probs of one sample's response tokens under the three policies; multiples of 1/1024, so exact in float32."""

    rollout: list[float]
    proximal: list[float]
    trainer: list[float]


def responses() -> list[Response]:
    """The same on every machine and Python."""
    random = Random(20261126)
    return [_response(random, length) for length in LENGTHS]


def _response(random: Random, length: int) -> Response:
    rollout = [_exact(-4 * random.random()) for _ in range(length)]
    proximal = [_exact(value + 2.4 * (random.random() - 0.5)) for value in rollout]
    trainer = [_exact(value + 3.0 * (random.random() - 0.5)) for value in proximal]
    return Response(rollout, proximal, trainer)


def _exact(value: float) -> float:
    return round(value * 1024) / 1024
