"""Rewards for texts that mean nothing, named in recipes by their dotted path."""

import threading


def parity(text: str, answer: str) -> float:
    """0 or 1, each for half of all texts: half of the groups of two are mixed."""
    return float(sum(text.encode()) % 2)


def touchy(text: str, answer: str) -> float:
    """Parity, but for one text in five or so, which it raises at."""
    if sum(text.encode()) % 5 == 0:
        raise LookupError("not this one")
    return parity(text, answer)


def slow_at_times(text: str, answer: str) -> float:
    """The same texts, which it never comes back from."""
    if sum(text.encode()) % 5 == 0:
        threading.Event().wait()
    return parity(text, answer)


def broken(text: str, answer: str) -> float:
    """Never anything."""
    raise LookupError(f"no judge for {answer}")
