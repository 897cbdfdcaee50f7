"""Perplexity of a model on worked solutions, in BF16, INT8 and FP8, the last two by the service's kernels.

    python benchmarks/perplexity.py --model MODEL --data test.jsonl --json perplexity.json

A text is `question`, a line's end and `answer`; the tokens of the answer count. The question is whether precisions lie
within 2 % of each other, and the exit code says so. Knows the rows of GSM8K; knows nothing of engines or services.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flashrl_rollout.layer_selection import LayerSelection
from flashrl_wire.messages import Quantization

if TYPE_CHECKING:  # torch takes seconds
    from flashrl_rollout.measure.token_scores import ScoredText

WITHIN = 0.02


@dataclass(frozen=True)
class Perplexity:
    """One precision: the share of the linear layers' elements in 8 bits, and exp of the mean loss a token."""

    precision: str
    layers: str
    quantized_fraction: float
    perplexity: float
    relative_to_bf16: float


def main() -> int:
    """0 where all precisions are within 2 % of bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--count", type=int, default=200, help="rows from the first")
    parser.add_argument("--quantization", nargs="+", choices=["int8", "fp8"], default=["int8", "fp8"])
    parser.add_argument("--default-of", choices=["cuda", "cpu"], default="cuda", help="whose default selection")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    rows = [json.loads(line) for line in args.data.read_text().splitlines()[: args.count]]
    found, num_tokens = measure(args.model, rows, args.quantization, args.default_of)
    Console().print(table(found, f"{args.model}: {len(rows)} solutions, {num_tokens} tokens"))
    if args.json:
        content = {
            "model": args.model,
            "rows": len(rows),
            "tokens": num_tokens,
            "found": [asdict(each) for each in found],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(abs(each.relative_to_bf16) <= WITHIN for each in found) else 1


def measure(
    name: str, rows: Sequence[dict[str, str]], quantizations: Sequence[Quantization], default_of: str
) -> tuple[list[Perplexity], int]:
    """bf16, then each precision with all linear layers and with the default selection; and the number of tokens."""
    from flashrl_rollout.measure import subject
    from flashrl_rollout.measure.layer_kinds import selected_modules
    from flashrl_rollout.measure.measurer import STORAGE
    from flashrl_rollout.measure.rows_linear import ExchangeableModel
    from flashrl_rollout.measure.token_scores import token_logprobs

    measured = subject.load(name, quantizations)
    model = measured.model
    everything = [module for kind in measured.kinds for module in kind.modules]
    chosen = selected_modules(measured.kinds, LayerSelection(), measured.packed, default_of)
    texts = [solution(row, measured.encode) for row in rows]
    bf16 = math.exp(-float(token_logprobs(model, texts).double().mean()))
    found = [Perplexity("bf16", "none", 0.0, bf16, 0.0)]
    for quantization in quantizations:
        kernel_maker = subject.kernel_maker(quantization)
        exchangeable = ExchangeableModel(model, everything, STORAGE[quantization], kernel_maker)
        for layers, modules in (("all", everything), (f"default on {default_of}", chosen)):
            with exchangeable.quantized(modules):
                value = math.exp(-float(token_logprobs(model, texts).double().mean()))
            share = elements(model, modules) / elements(model, everything)
            found.append(Perplexity(quantization, layers, share, value, value / bf16 - 1))
    return found, sum(text.num_scored for text in texts)


def solution(row: dict[str, str], encode: Callable[[str], list[int]]) -> "ScoredText":
    """The tokens of question and answer, of which those that are not the question's alone count."""
    from flashrl_rollout.measure.token_scores import ScoredText

    question, whole = encode(row["question"] + "\n"), encode(row["question"] + "\n" + row["answer"])
    pairs = zip(question, whole, strict=False)
    start = next((i for i, (left, right) in enumerate(pairs) if left != right), len(question))
    return ScoredText(tuple(whole), start)


def elements(model: Any, modules: Sequence[str]) -> int:
    """Elements of the original layers."""
    return sum(math.prod((layer.out_features, layer.in_features)) for layer in map(model.get_submodule, modules))


def table(found: Sequence[Perplexity], title: str) -> Table:
    """A row a precision."""
    made = Table("precision", "layers", "in 8 bits", "perplexity", "against bf16", title=title, title_justify="left")
    for each in found:
        share, against = f"{each.quantized_fraction:.0%}", f"{each.relative_to_bf16:+.3%}"
        made.add_row(each.precision, each.layers, share, f"{each.perplexity:.4f}", against)
    return made


if __name__ == "__main__":
    sys.exit(main())
