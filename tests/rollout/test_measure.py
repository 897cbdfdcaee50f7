"""What 8 bits cost and which layers stay bf16, on a small random model and without vLLM's kernels."""

import io
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from flashrl_rollout.cli import app
from flashrl_rollout.config import load_config
from flashrl_rollout.layer_selection import LayerSelection
from flashrl_rollout.measure import report
from flashrl_rollout.measure.choice import KindCost, choose
from flashrl_rollout.measure.kernel_times import layer_times
from flashrl_rollout.measure.layer_kinds import layer_kinds, selected_modules
from flashrl_rollout.measure.measurer import Measurer, PrecisionReport
from flashrl_rollout.measure.progress import Progress
from flashrl_rollout.measure.rows_linear import ExchangeableModel
from flashrl_rollout.measure.texts import prompts, read_texts
from flashrl_rollout.measure.token_scores import Mismatch, ScoredText, mismatch, sample, token_logprobs
from flashrl_wire.quantize import dequantize_rows, quantize_rows

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TEXTS = [ScoredText((1, 2, 3, 4, 5, 6), 2), ScoredText((9, 8), 1), ScoredText((7, 7, 7, 7), 3)]


class WeightOnly:
    """A kernel that multiplies by the values that codes and scales stand for, and leaves activations alone."""

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        self.shape = tuple(weight.shape)

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, dequantize_rows(weight, scale).to(x.dtype), bias)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            attention_bias=True, initializer_range=0.3,
        )
    )  # fmt: skip
    return made.to(torch.bfloat16).eval()


def test_kinds_are_what_the_engine_fuses(model: Any) -> None:
    kinds = {kind.name: kind for kind in layer_kinds(model, PACKED)}
    assert list(kinds) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    shapes = {name: (kind.layers[0].rows, kind.layers[0].columns) for name, kind in kinds.items()}
    assert shapes == {"qkv_proj": (64, 32), "o_proj": (32, 32), "gate_up_proj": (96, 32), "down_proj": (32, 48)}
    assert kinds["qkv_proj"].layers[1].name == "model.layers.1.self_attn.qkv_proj"
    assert kinds["qkv_proj"].patterns == ["*.k_proj", "*.q_proj", "*.v_proj"]
    assert kinds["down_proj"].saved_bytes == 2 * (32 * 48 * (2 - 1) - 32 * 4)
    assert [kind.name for kind in layer_kinds(model, {})][:2] == ["q_proj", "k_proj"]
    with pytest.raises(ValueError, match=r"model: .* has no linear layers"):
        layer_kinds(HeadOnly(), {})


class HeadOnly(nn.Module):
    """Nothing but a head, which the engine does not quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_selection_in_the_model_is_that_of_the_service(model: Any) -> None:
    kinds = layer_kinds(model, PACKED)
    selection = LayerSelection(keep_bf16=("*.0.*",), quantize_layers=64 * 32)
    chosen = selected_modules(kinds, selection, PACKED, "cuda")
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert chosen == [f"model.layers.1.{name}" for name in names]


def test_k3_over_a_distribution_is_its_kl() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # as often as p says
    found = mismatch(p.log()[drawn], q.log()[drawn])
    kl = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert found.k3_kl == pytest.approx(kl, rel=1e-5)
    assert found.mean_abs_logprob == pytest.approx(0.5 * math.log(1.25) + 0.3 * math.log(4 / 3), rel=1e-5)


def test_logprobs_do_not_depend_on_what_else_is_in_the_batch(model: Any) -> None:
    exact = model.double()
    found = token_logprobs(exact, TEXTS)
    expected = []
    for text in TEXTS:
        logits = exact(torch.tensor([text.token_ids])).logits[0].double()
        scores = logits - logits.logsumexp(dim=-1, keepdim=True)
        expected += [scores[i - 1, text.token_ids[i]].item() for i in range(text.start, len(text.token_ids))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_samples_end_where_the_model_ends_them(model: Any) -> None:
    ends = set(range(0, 50, 5))
    model.generation_config.eos_token_id = sorted(ends)
    asked = [[3], [4, 6, 7], [8, 9]]
    drawn, again, other = (sample(model, itertools.cycle(asked), 61, 30, seed=seed) for seed in (1, 1, 2))
    assert drawn == again != other
    assert 61 <= sum(text.num_scored for text in drawn) < 61 + 30
    drawn = drawn[:3]
    assert [(list(text.token_ids[: text.start]), text.start) for text in drawn] == [
        ([3], 1),
        ([4, 6, 7], 3),
        ([8, 9], 2),
    ]
    for text in drawn:
        body = text.token_ids[text.start :]
        assert body[-1] in ends or len(body) == 30
        assert not ends & set(body[:-1])


def test_exchanged_layers_compute_with_the_stored_form_and_go_back(model: Any) -> None:
    modules = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    before = token_logprobs(model, TEXTS)
    exchangeable = ExchangeableModel(model, modules, "int8_rows", WeightOnly)
    with exchangeable.quantized(modules):
        found = token_logprobs(model, TEXTS)
    assert torch.equal(token_logprobs(model, TEXTS), before)
    assert not torch.equal(found, before)
    with torch.no_grad():
        for name in modules:
            weight = model.get_submodule(name).weight
            weight.copy_(dequantize_rows(*quantize_rows(weight, "int8_rows")))
    assert torch.equal(token_logprobs(model, TEXTS), found)


def test_a_weight_that_is_no_number_is_named(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: a weight is NaN"):
        ExchangeableModel(model, ["model.layers.1.mlp.up_proj"], "fp8_rows", WeightOnly)


def measured(model: Any, limit_kl: float = math.inf, told: list[str] | None = None) -> PrecisionReport:
    texts = sample(model, itertools.cycle([[1], [2], [3]]), 41, 20, seed=0)
    measurer = Measurer(model, layer_kinds(model, PACKED), texts)
    tell = [] if told is None else told
    return measurer.report("int8", WeightOnly, limit_kl, has_times=False, tell=tell.append)


@pytest.mark.parametrize(("is_terminal", "lines"), [(False, ["loading [x]", "sampling"]), (True, [])])
def test_elsewhere_than_on_a_terminal_every_piece_has_a_line(is_terminal: bool, lines: list[str]) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=80)
    with Progress(console) as progress:
        progress.piece("loading [x]")
        progress.piece("sampling")
    assert [line for line in written.getvalue().splitlines() if "\x1b" not in line] == lines


def test_each_kind_is_measured_alone_and_all_together(model: Any) -> None:
    told: list[str] = []
    found = measured(model, told=told)
    alone = ["int8: qkv_proj", "int8: o_proj", "int8: gate_up_proj", "int8: down_proj"]
    assert told == [*alone, "int8: down_proj, gate_up_proj, o_proj, qkv_proj"]  # which is what was chosen, too
    kls = {kind.kind: kind.mismatch.k3_kl for kind in found.kinds}
    assert len(set(kls.values())) == 4
    assert min(kls.values()) > 0
    assert found.all_kinds == found.chosen
    limited = measured(model, limit_kl=found.all_kinds.k3_kl * 0.9)
    assert limited.kinds == found.kinds
    first = max(found.kinds, key=lambda kind: kind.mismatch.k3_kl / kind.saved_bytes).kind
    assert next(iter(limited.choice.kept)) == first
    assert limited.chosen.k3_kl <= found.all_kinds.k3_kl * 0.9


KINDS = [
    KindCost("a", 0.004, 100),  # 4e-5 a byte
    KindCost("b", 0.004, 400),  # 1e-5
    KindCost("c", 0.001, 10),  # 1e-4
]


def total(names: frozenset[str]) -> float:
    return sum(kind.k3_kl for kind in KINDS if kind.name in names)


@pytest.mark.parametrize(
    ("limit", "quantized", "kept", "kl"),
    [
        (math.inf, "abc", "", 0.009),
        (0.0091, "abc", "", 0.009),
        (0.0085, "ab", "c", 0.008),
        (0.0045, "b", "ca", 0.004),
        (0.0, "", "cab", 0.0),
    ],
)
def test_largest_kl_for_a_saved_byte_goes_first(limit: float, quantized: str, kept: str, kl: float) -> None:
    choice = choose(KINDS, total, limit)
    assert ("".join(choice.quantized), "".join(choice.kept)) == (quantized, kept)
    assert choice.k3_kl == pytest.approx(kl)


def test_what_is_slower_stays_bf16_whatever_its_kl() -> None:
    kinds = [replace(KINDS[0], speedup=1.4), replace(KINDS[1], speedup=0.9), replace(KINDS[2], speedup=1.0)]
    choice = choose(kinds, total, math.inf)
    assert (choice.quantized, choice.kept) == (("a", "c"), {"b": "0.90x as fast"})


def test_choice_is_judged_by_the_kl_of_all_that_is_left_and_not_by_a_sum() -> None:
    together: dict[frozenset[str], float] = {frozenset("abc"): 1.0, frozenset("ab"): 0.5, frozenset("b"): 0.1}
    choice = choose(KINDS, together.__getitem__, 0.2)
    assert (choice.quantized, choice.k3_kl) == (("b",), 0.1)


def test_fused_layers_are_timed_as_one() -> None:
    made: list[WeightOnly] = []

    def make_kernel() -> WeightOnly:
        made.append(WeightOnly())
        return made[-1]

    layers = [[nn.Linear(8, rows, dtype=torch.bfloat16) for rows in (16, 4, 4)] for _ in range(2)]
    times = layer_times(layers, "int8_rows", make_kernel, (1, 3))
    assert [kernel.shape for kernel in made] == [(24, 8), (24, 8)]
    assert [time.rows for time in times] == [1, 3]
    assert all(time.bf16_us > 0 and time.quantized_us > 0 for time in times)


def test_file_is_read_by_the_service_and_numbers_by_people(model: Any, tmp_path: Path) -> None:
    found = measured(model, limit_kl=0.0)
    kinds = layer_kinds(model, PACKED)
    file = tmp_path / "skip.toml"
    file.write_text(report.precision_file([found], kinds, ["facts"]))
    config = load_config(None, {}, {"model": "m", "precision_file": str(file)})
    every = {"*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "*.up_proj", "*.down_proj"}
    assert (set(config.keep_bf16), config.quantize_layers) == (every, "all")
    assert "# down_proj 32 x 48: k3 KL " in file.read_text()
    console = Console(width=150, record=True)
    console.print(report.table([found], "title"))
    printed = console.export_text()
    assert f"{found.all_kinds.k3_kl:.6f}" in printed
    content = json.loads(json.dumps(report.as_json([found], {"model": "m"})))
    assert content["precisions"][0]["all_kinds"]["k3_kl"] == found.all_kinds.k3_kl
    assert [kind["speedup"] for kind in content["precisions"][0]["kinds"]] == [None] * 4


def test_prompts_come_from_rows_again_and_again_or_from_chance(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"question": "a?", "answer": "b"}\n\n{"text": "c\\n"}\n')
    texts = read_texts(file)
    assert texts == ["a?\n", "c\n"]
    assert list(itertools.islice(prompts(texts, lambda text: [len(text)], 9), 3)) == [[3], [2], [3]]
    drawn = list(itertools.islice(prompts(None, lambda text: [], 9), 40))
    assert {token for (token,) in drawn} <= set(range(9))
    assert len({token for (token,) in drawn}) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: model: there is no folder /no/such"),
        (["--quantization", "int4"], "error: quantization: should be int8 or fp8, got 'int4'"),
        (["--out", "/no/such/skip.toml"], "error: model: there is no folder /no/such"),
    ],
)
def test_mistakes_are_one_line_and_2(arguments: Sequence[str], message: str) -> None:
    done = CliRunner().invoke(app, ["measure", "--model", "/no/such", *arguments])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "texts: .*: No such file"),
        ("", "texts: .* has no rows"),
        ("{", r"texts: .*:1: no JSON"),
        ('{"text": "a"}\n{"answer": "b"}', r"texts: .*:2: needs a text as prompt or question or text"),
        ('{"text": 3}', r"texts: .*:1: needs a text"),
    ],
)
def test_texts_that_are_none_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(file)


def test_nothing_is_compared_with_itself() -> None:
    scores = torch.tensor([-1.0, -2.0])
    assert mismatch(scores, scores) == Mismatch(0.0, 0.0)
