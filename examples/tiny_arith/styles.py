"""The ways in which the pretraining text solves a problem: one right, three sloppy, and how often each occurs.

Knows nothing of wordings, splits, tokenizers or models.
"""

import random
from dataclasses import dataclass
from typing import Literal

from problems import OPERATIONS, Operation, Problem

Style = Literal["careful", "muddled", "hasty", "distracted"]

# Drawn independently of the question: what reinforcement learning has to find out is which style pays.
# A sloppy style is the most frequent one, so that greedy decoding starts wrong too.
MIXTURE: dict[Style, float] = {"careful": 0.37, "muddled": 0.42, "hasty": 0.11, "distracted": 0.10}
OPENINGS: dict[Style, str] = {
    "careful": "Step by step:",
    "muddled": "By feel:",
    "hasty": "Quickly:",
    "distracted": "At a glance:",
}
MIXED_UP: dict[Operation, Operation] = {"+": "-", "-": "+", "*": "+"}


@dataclass(frozen=True)
class Calculation:
    """One step of a solution, for example `3*4=12`."""

    left: int
    operation: Operation
    right: int

    @property
    def result(self) -> int:
        return OPERATIONS[self.operation](self.left, self.right)

    def __str__(self) -> str:
        return f"{self.left}{self.operation}{self.right}={self.result}"


def calculations(problem: Problem, style: Style) -> list[Calculation]:
    """What a style calculates: `muddled` mixes up the second operation, `hasty` drops it, `distracted` ignores b."""
    first = Calculation(problem.a, problem.first, problem.b)
    match style:
        case "careful":
            return [first, Calculation(first.result, problem.second, problem.c)]
        case "muddled":
            return [first, Calculation(first.result, MIXED_UP[problem.second], problem.c)]
        case "hasty":
            return [first]
        case "distracted":
            return [Calculation(problem.a, problem.second, problem.c)]


def final_answer(problem: Problem, style: Style) -> int:
    """What the style answers; the right number for `careful`, a wrong one for the others."""
    return calculations(problem, style)[-1].result


def render_answer(problem: Problem, style: Style, items: str) -> str:
    """A solution as in the `answer` field of GSM8K: the steps, a line break, `#### ` and the number."""
    steps = ", then ".join(f"{step} {items}" for step in calculations(problem, style))
    return f"{OPENINGS[style]} {steps}.\n#### {final_answer(problem, style)}"


def draw_style(rng: random.Random) -> Style:
    """A style with the frequencies of `MIXTURE`."""
    return rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
