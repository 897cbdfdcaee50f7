"""Which layers are quantized: names, fused layers, sizes, and the file that holds the choice."""

from pathlib import Path

import pytest

from flashrl_rollout.config import load_config
from flashrl_rollout.layer_selection import LayerSelection
from flashrl_rollout.precision_file import precision_table

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
QKV = "model.layers.0.self_attn.qkv_proj"
MODULES = [
    *(f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")),
    "model.embed_tokens",
]


def quantized(
    selection: LayerSelection, name: str, shape: tuple[int, int] = (1 << 13, 1 << 12), device: str = "cuda"
) -> bool:
    return selection.quantizes(name, PACKED, shape, device)


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ((), QKV, True),
        (("*.down_proj",), "model.layers.0.mlp.down_proj", False),
        (("*.down_proj",), "model.layers.0.self_attn.o_proj", True),
        (("down_proj",), "model.layers.0.mlp.down_proj", True),  # a pattern is over the whole name
        (("model.layers.0.*",), QKV, False),
        (("model.layers.0.*",), "model.layers.10.mlp.down_proj", True),
        (("*.q_proj", "*.k_proj", "*.v_proj"), QKV, False),
        (("*.[qkv]_proj",), QKV, False),
        (("*.qkv_proj",), QKV, False),
    ],
)
def test_patterns_keep_layers_in_bf16(patterns: tuple[str, ...], name: str, expected: bool) -> None:
    assert quantized(LayerSelection(keep_bf16=patterns), name) is expected


def test_a_pattern_over_a_part_of_a_fused_layer_is_a_mistake_that_names_both() -> None:
    selection = LayerSelection(keep_bf16=("*.q_proj",))
    with pytest.raises(
        ValueError, match=r"self_attn\.q_proj is matched and .*self_attn\.k_proj is not, but .*qkv_proj"
    ):
        quantized(selection, QKV)
    with pytest.raises(ValueError, match=r"q_proj is matched .*qkv_proj computes both at once"):
        selection.check(MODULES, PACKED)


@pytest.mark.parametrize(
    ("quantize_layers", "device", "shape", "expected"),
    [
        ("auto", "cuda", (896, 4864), False),  # down_proj of 0.5B
        ("auto", "cuda", (9728, 896), True),  # gate_up_proj of 0.5B
        ("auto", "cuda", (1536, 8960), False),  # down_proj of 1.5B, larger but narrow
        ("auto", "cuda", (2560, 9728), True),  # down_proj of Qwen3-4B
        ("auto", "cuda", (3584, 3584), True),  # o_proj of 7B
        ("auto", "cpu", (1, 2), True),
        ("all", "cuda", (1, 2), True),
        (100, "cpu", (9, 11), False),
        (100, "cpu", (5, 20), True),
    ],
)
def test_small_layers_stay_bf16(quantize_layers: str, device: str, shape: tuple[int, int], expected: bool) -> None:
    selection = LayerSelection.model_validate({"quantize_layers": quantize_layers})
    assert quantized(selection, "model.layers.0.mlp.down_proj", shape, device) is expected


def test_a_pattern_without_a_match_is_named() -> None:
    LayerSelection(keep_bf16=("*.down_proj", "*.qkv_proj", "*.gate_up_proj")).check(MODULES, PACKED)
    with pytest.raises(
        ValueError, match=r"^keep_bf16: \*\.fc1 matches no module of the model; there is model\.layers\."
    ):
        LayerSelection(keep_bf16=("*.down_proj", "*.fc1")).check(MODULES, PACKED)


def test_selection_survives_the_way_through_vllm() -> None:
    selection = LayerSelection(keep_bf16=("*.o_proj",), quantize_layers=5)
    assert LayerSelection.of({"other": 1} | selection.additional_config()) == selection
    assert LayerSelection.of({}) == LayerSelection.of(None) == LayerSelection()
    with pytest.raises(ValueError, match="keep_bf15"):
        LayerSelection.of({"flashrl": {"keep_bf15": []}})


def test_file_is_the_same_as_settings_and_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "skip.toml"
    file.write_text(precision_table("int8", ["*.down_proj", "*.o_proj"], ["measured"]) + precision_table("fp8", [], []))
    flags = {"model": "m", "precision_file": str(file)}
    config = load_config(None, {}, flags)
    assert (config.keep_bf16, config.quantize_layers) == (("*.down_proj", "*.o_proj"), "all")
    assert load_config(None, {}, flags | {"quantization": "fp8"}).keep_bf16 == ()
    assert load_config(None, {}, flags | {"quantization": "none"}).quantize_layers == "auto"
    config = load_config(None, {"FLASHRL_ROLLOUT_KEEP_BF16": "*.q_proj, *.k_proj"}, flags | {"quantize_layers": "9"})
    assert (config.keep_bf16, config.quantize_layers) == (("*.q_proj", "*.k_proj"), 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"precision_file: .*skip\.toml: No such file"),
        ("[int8", r"precision_file: .*skip\.toml: "),
        ("[fp8]\n", r"precision_file: .*skip\.toml has no table \[int8\]"),
        ("int8 = 3\n", r"precision_file: .*skip\.toml has no table \[int8\]"),
        ("[int8]\nport = 3\n", r"precision_file: .*skip\.toml: \[int8\] has the unknown key port"),
        ("[int8]\nkeep_bf16 = 3\n", r"keep_bf16: .*got 3 \(from .*skip\.toml\)"),
        ('[int8]\nquantize_layers = "some"\n', r"quantize_layers: should be auto, all or a number.*from .*skip\.toml"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "skip.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        load_config(None, {}, {"model": "m", "precision_file": str(file)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["some", "-1", "1.5", ""])
def test_quantize_layers_is_a_word_or_a_number(value: str) -> None:
    with pytest.raises(ValueError, match=r"^quantize_layers: should be auto, all or a number of elements, got"):
        load_config(None, {}, {"model": "m", "quantize_layers": value})
