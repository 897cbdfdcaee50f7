"""`flashrl-rollout measure` with the service's kernels: their products against float64, and a whole measurement."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.helpers.real_engine import ROOT
from torch import Tensor, nn

from flashrl_rollout.config import load_config
from flashrl_rollout.measure.rows_linear import RowsLinear
from flashrl_rollout.measure.run import MeasureSettings, run
from flashrl_wire.quantize import LARGEST_CODE, RowStorage, dequantize_rows, quantize_rows

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = ROOT / "examples" / "tiny_arith" / "model"


def reference(x: Tensor, linear: nn.Linear, storage: RowStorage) -> Tensor:
    """The product in float64 of a weight by rows and activations by tokens, both rounded to 8 bits."""
    weight = dequantize_rows(*quantize_rows(linear.weight.detach(), storage)).double()
    scale = x.double().abs().amax(dim=-1, keepdim=True) / LARGEST_CODE[storage]
    codes = x.double() / scale
    rounded = codes.round() if storage == "int8_rows" else codes.float().to(torch.float8_e4m3fn).double()
    return (rounded * scale) @ weight.t() + linear.bias.detach().double()


@pytest.mark.parametrize("storage", ["int8_rows", "fp8_rows"])
def test_layers_compute_what_float64_says(storage: RowStorage) -> None:
    from flashrl_rollout import kernels

    torch.manual_seed(0)
    linear = nn.Linear(192, 96, dtype=torch.bfloat16)
    x = torch.randn(2, 7, 192).to(torch.bfloat16) * torch.logspace(-2, 2, 7)[:, None].to(torch.bfloat16)
    with torch.inference_mode():
        found = RowsLinear(linear, storage, kernels.make_kernel(storage))(x).double()
        exact, plain = reference(x, linear, storage), linear(x).double()
    size = exact.abs().amax(dim=-1, keepdim=True)
    assert float(((found - exact) / size).abs().max()) < 2**-8  # the result is bf16
    assert float(((plain - exact) / size).abs().max()) > 2**-8  # and 8 bits are not bf16


def test_a_measurement_ends_in_a_file_for_the_service(tmp_path: Path) -> None:
    texts = ROOT / "examples" / "tiny_arith" / "data" / "heldout.jsonl"
    out, numbers = tmp_path / "skip.toml", tmp_path / "numbers.json"
    console = Console(width=150, record=True)
    run(MeasureSettings(str(MODEL), ("int8", "fp8"), texts, 512, 0.0, True, out, numbers), console)
    content = json.loads(numbers.read_text())
    int8, fp8 = content["precisions"]
    assert [kind["kind"] for kind in int8["kinds"]] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    kls = [kind["mismatch"]["k3_kl"] for found in (int8, fp8) for kind in found["kinds"]]
    assert all(0 < kl < 0.01 for kl in kls)
    assert 512 <= content["tokens"] < 512 + 128
    assert all([time["rows"] for time in kind["times"]] == [1, 64, 256, 1024] for kind in fp8["kinds"])
    assert all(math.isfinite(kind["speedup"]) for kind in int8["kinds"])
    config = load_config(None, {}, {"model": str(MODEL), "precision_file": str(out)})
    assert "*.down_proj" in config.keep_bf16  # nothing but bf16 has a KL of 0
    assert "k3 KL" in console.export_text()
