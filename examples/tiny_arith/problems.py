"""Two-step arithmetic word problems as data: which exist, which split each belongs to, how each one reads.

Knows nothing of solutions, styles, tokenizers or models.
"""

import hashlib
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

Operation = Literal["+", "-", "*"]
Split = Literal["pretrain", "train", "heldout"]

OPERATIONS: dict[Operation, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST_NUMBER = 99  # every number in a problem or a solution has one or two digits

NAMES = (
    "Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Iris",
    "Jack", "Kim", "Leo", "Mia", "Noah", "Olga", "Pedro", "Ravi", "Sara",
)  # fmt: skip
ITEMS = ("apples", "beads", "books", "cards", "coins", "eggs", "nuts", "pens", "plums", "shells", "stamps", "toys")
FIRST_SENTENCES: dict[Operation, tuple[str, ...]] = {
    "+": (
        "{name} has {a} {items} and finds {b} more.",
        "{name} buys {a} {items} on Monday and {b} on Tuesday.",
        "There are {a} {items} on a shelf and {name} adds {b} to them.",
    ),
    "-": (
        "{name} has {a} {items} and loses {b} of them.",
        "There were {a} {items} in a box until {name} took out {b}.",
        "{name} makes {a} {items} and sells {b} of them.",
    ),
    "*": (
        "{name} has {a} boxes with {b} {items} in each.",
        "{name} buys {b} {items} a day for {a} days.",
        "There are {a} rows of {b} {items} and {name} counts them.",
    ),
}
SECOND_SENTENCES: dict[Operation, tuple[str, ...]] = {
    "+": ("Then a friend brings {c} more.", "After that {c} new ones come in.", "Later {c} are added."),
    "-": ("Then {c} of them break.", "After that a friend takes {c} away.", "Later {c} are given away."),
    "*": (
        "Next year there are {c} times as many.",
        "Then the number grows to {c} times that.",
        "A shop has {c} times as many.",
    ),
}
QUESTIONS = ("How many {items} are there in the end?", "How many {items} does that make?")


@dataclass(frozen=True, order=True)
class Problem:
    """`(a first b) second c`, for example `Problem("*", "+", 3, 4, 5)`: three boxes of four, then five more."""

    first: Operation
    second: Operation
    a: int
    b: int
    c: int

    @property
    def middle(self) -> int:
        """The result of the first step."""
        return OPERATIONS[self.first](self.a, self.b)

    @property
    def result(self) -> int:
        """The right answer."""
        return OPERATIONS[self.second](self.middle, self.c)

    @property
    def key(self) -> str:
        """The (operations, numbers) tuple as text; 3*4 and 4*3 share one, so that neither leaks the other."""
        a, b = (self.a, self.b) if self.first == "-" else sorted((self.a, self.b))
        return f"{self.first}{self.second},{a},{b},{self.c}"


def enumerate_problems() -> Iterator[Problem]:
    """Every problem of the example, in a fixed order: the numbers a child does in the head, no result above 99."""
    for first, second in product(OPERATIONS, OPERATIONS):
        largest_a = 12 if first == "*" else 15 if second == "*" else 32
        largest_c = 4 if second == "*" else 9
        for a, b, c in product(range(2, largest_a + 1), range(2, 10), range(2, largest_c + 1)):
            problem = Problem(first, second, a, b, c)
            if _is_easy(problem):
                yield problem


def _is_easy(problem: Problem) -> bool:
    # Subtracting c must be possible from a and from the middle too: the sloppy styles of styles.py do that.
    return problem.c < min(problem.a, problem.middle) and problem.middle <= 40 and problem.result <= LARGEST_NUMBER


def split_of(problem: Problem) -> Split:
    """The split that owns the problem's key: a hash decides, so splits are disjoint whatever is drawn from them."""
    digest = hashlib.sha256(problem.key.encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    if bucket < 10:
        return "heldout"
    return "train" if bucket < 35 else "pretrain"


def problems_of(split: Split) -> dict[tuple[Operation, Operation], list[Problem]]:
    """All problems of one split by their operations, in a fixed order."""
    groups: dict[tuple[Operation, Operation], list[Problem]] = {pair: [] for pair in product(OPERATIONS, OPERATIONS)}
    for problem in enumerate_problems():
        if split_of(problem) == split:
            groups[problem.first, problem.second].append(problem)
    return groups


@dataclass(frozen=True)
class Wording:
    """How a problem is dressed: drawn independently of its numbers."""

    name: str
    items: str
    first: int
    second: int
    question: int


def draw_wording(rng: random.Random) -> Wording:
    """A wording, uniform over all of them."""
    return Wording(rng.choice(NAMES), rng.choice(ITEMS), rng.randrange(3), rng.randrange(3), rng.randrange(2))


def render_question(problem: Problem, wording: Wording) -> str:
    """The problem in words, as in the `question` field of GSM8K."""
    sentences = (
        FIRST_SENTENCES[problem.first][wording.first],
        SECOND_SENTENCES[problem.second][wording.second],
        QUESTIONS[wording.question],
    )
    facts = {"name": wording.name, "items": wording.items, "a": problem.a, "b": problem.b, "c": problem.c}
    return " ".join(sentences).format(**facts)
