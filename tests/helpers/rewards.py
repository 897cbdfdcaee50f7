"""Rewards for texts that mean nothing, named in recipes by their dotted path."""


def parity(text: str, answer: str) -> float:
    """0 or 1, each for half of all texts: half of the groups of two are mixed."""
    return float(sum(text.encode()) % 2)
