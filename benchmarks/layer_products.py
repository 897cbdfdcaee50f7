"""Time of one linear layer by its shape, in bf16 and in 8 bits with the activations' quantization.

    python -m benchmarks.layer_products 9728,896 1536,8960 --rows 64 256 1024 --json products.json      # N,K each

As `flashrl-rollout measure` times the kinds of a model, but for shapes of no model at hand: several random layers in
turn, so that no weight is still in a cache, on a GPU as a CUDA graph. What `quantize_layers = auto` chooses is beside
it. Knows the service's kernels; knows nothing of models.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashrl_rollout import kernels
from flashrl_rollout.layer_selection import LayerSelection
from flashrl_rollout.measure.kernel_times import layer_times
from flashrl_wire.quantize import RowStorage

_STORAGES: tuple[RowStorage, ...] = ("int8_rows", "fp8_rows")
_CACHE_BYTES = 1 << 27  # more than any cache holds


def measured(rows: int, columns: int, storage: RowStorage, row_counts: list[int]) -> list[dict[str, Any]]:
    """A row of the table for each number of rows of activations."""
    device = kernels.device()
    count = max(2, min(16, _CACHE_BYTES // (rows * columns)))
    layers = [[nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)] for _ in range(count)]
    chosen = LayerSelection().quantizes("layer", {}, (rows, columns), device)
    times = layer_times(layers, storage, lambda: kernels.make_kernel(storage), row_counts)
    return [
        {
            "shape": [rows, columns],
            "storage": storage,
            "rows": time.rows,
            "bf16_us": round(time.bf16_us, 2),
            "eight_bits_us": round(time.quantized_us, 2),
            "auto": chosen,
        }
        for time in times
    ]


def main() -> int:
    """0 once everything is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="N,K")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    print("| N x K | storage | rows | bf16 us | 8 bits us | auto |\n|---|---|---|---|---|---|")
    for shape in args.shapes:
        rows, columns = map(int, shape.split(","))
        for storage in _STORAGES:
            for row in measured(rows, columns, storage, args.rows):
                found.append(row)
                choice = "8 bits" if row["auto"] else "bf16"
                cells = [f"{rows} x {columns}", storage, row["rows"], row["bf16_us"], row["eight_bits_us"], choice]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
