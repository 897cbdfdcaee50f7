"""Writes the example's data in GSM8K's JSONL form: `python generate.py OUT_DIR` -> train.jsonl and heldout.jsonl.

Knows nothing of tokenizers, models or of how a trainer reads the files.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from problems import Problem, Split, draw_wording, problems_of, render_question
from styles import Style, draw_style, render_answer

SEED = 20260


def draw_distinct(split: Split, count: int, rng: random.Random) -> list[Problem]:
    """`count` different problems of a split, as evenly over the operations as the split allows, shuffled."""
    groups = list(problems_of(split).values())
    if count > sum(map(len, groups)):
        raise ValueError(f"count: the {split} split has only {sum(map(len, groups))} problems, {count} were asked for")
    for group in groups:
        rng.shuffle(group)
    chosen: list[Problem] = []
    while len(chosen) < count:
        chosen += [group.pop() for group in groups if group]
    rng.shuffle(chosen := chosen[:count])
    return chosen


def write_rows(path: Path, split: Split, count: int, rng: random.Random) -> None:
    """One `{"question", "answer"}` object a line, each answer solved the careful way."""
    with path.open("w", encoding="utf-8") as lines:
        for problem in draw_distinct(split, count, rng):
            wording = draw_wording(rng)
            answer = render_answer(problem, "careful", wording.items)
            lines.write(json.dumps({"question": render_question(problem, wording), "answer": answer}) + "\n")


def pretraining_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (question, answer) pairs of the pretraining split: operations uniform, styles by `MIXTURE`."""
    groups: list[list[Problem]] = list(problems_of("pretrain").values())
    while True:
        problem, wording = rng.choice(rng.choice(groups)), draw_wording(rng)
        style: Style = draw_style(rng)
        yield render_question(problem, wording), render_answer(problem, style, wording.items)


def write_data(out_dir: Path, seed: int = SEED, num_train: int = 1536, num_heldout: int = 512) -> None:
    """Writes both files; the same arguments give the same bytes."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_rows(out_dir / "train.jsonl", "train", num_train, random.Random(f"train-{seed}"))
    write_rows(out_dir / "heldout.jsonl", "heldout", num_heldout, random.Random(f"heldout-{seed}"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and heldout.jsonl.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_data(arguments.out_dir, arguments.seed)


if __name__ == "__main__":
    main()
