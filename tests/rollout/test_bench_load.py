"""What a benchmark asks: settings, arms, prompts, lengths, seeds, and the cache that the load needs."""

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_rollout.bench.model import kv_cache_gib, without_end
from flashrl_rollout.bench.service_arm import request_body
from flashrl_rollout.bench.settings import read_settings
from flashrl_rollout.bench.shape_names import SHAPES
from flashrl_rollout.bench.workload import make_workload, response_lengths


def settings(**values: Any) -> Any:
    return read_settings(**({"shape": "tiny", "requests": 6, "prompt_tokens": 4, "tokens": 8} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": ""}, "model: name either a model or a shape"),
        ({"model": "m"}, "model: name either a model or a shape"),
        ({"shape": "qwen9"}, "shape: 'qwen9' is none of tiny, smollm2-135m, qwen2.5-0.5b"),
        ({"quantization": ["int4"]}, "quantization: .*got 'int4'"),
        ({"arms": "service,motor"}, "arms: 'motor' is neither service nor engine"),
        ({"arms": "engine:int3"}, "arms: 'int3' is no quantization; there are int8, fp8, none"),
        ({"samples": 4}, "requests: 6 sequences are no whole groups of 4 samples"),
        ({"lengths": "lognormal", "prompts_per_request": 2}, "prompts_per_request: must be 1"),
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1, got 0"),
        ({"timeout_s": float("nan")}, "timeout_s: "),
    ],
)
def test_mistakes_are_one_line_that_names_the_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        settings(**values)
    assert "\n" not in str(error.value)


def test_arms_are_crossed_with_quantizations_unless_they_name_one() -> None:
    both = settings(quantization=["none", "int8"])
    assert list(map(str, both.arm_names())) == ["service/none", "service/int8", "engine/none", "engine/int8"]
    some = settings(quantization=["none", "fp8"], arms="service, engine:fp8,service:none")
    assert list(map(str, some.arm_names())) == ["service/none", "service/fp8", "engine/fp8"]


def test_every_arm_gets_the_same_and_every_round_new_prompts() -> None:
    first, again, second = (make_workload(settings(), 512, turn) for turn in (0, 0, 1))
    assert first == again
    assert not {tuple(prompt) for prompt in first.prompts} & {tuple(prompt) for prompt in second.prompts}
    assert {len(prompt) for prompt in first.prompts} == {4}
    assert all(0 <= token < 512 for prompt in first.prompts for token in prompt)
    assert first.num_tokens == 6 * 8


def test_the_round_that_warms_up_is_short() -> None:
    assert make_workload(settings(tokens=256), 512, 0).max_tokens == [64] * 6
    assert make_workload(settings(tokens=256), 512, 1).max_tokens == [256] * 6
    assert make_workload(settings(tokens=8), 512, 0).max_tokens == [8] * 6


def test_no_two_sequences_of_a_run_share_a_seed() -> None:
    asked = settings(samples=3, seed=5)
    seeds = [
        make_workload(asked, 512, turn).prompt_seed(index) + sample  # type: ignore[operator]
        for turn in range(3)
        for index in range(2)
        for sample in range(3)
    ]
    assert sorted(seeds) == list(range(5, 5 + 18))
    assert make_workload(settings(seeded=False), 512, 1).prompt_seed(1) is None


def test_a_request_of_several_prompts_seeds_them_as_the_engine_is_asked_to() -> None:
    """The service gives sample j of a request's prompt i the seed `seed + i * n + j`."""
    workload = make_workload(settings(samples=2, requests=8), 512, 1)
    body = request_body(workload, 2, 2)
    assert body["prompts"] == workload.prompts[2:4]
    assert (body["n"], body["sampling"]["seed"] + 1 * body["n"]) == (2, workload.prompt_seed(3))
    assert body["sampling"]["max_tokens"] == 8
    unseeded = make_workload(settings(seeded=False), 512, 1)
    assert "seed" not in request_body(unseeded, 0, 1)["sampling"]


def test_lognormal_lengths_have_the_median_asked_for_and_end_at_4096() -> None:
    lengths = sorted(response_lengths(settings(lengths="lognormal", requests=2001, tokens=512)))
    assert lengths[1000] == pytest.approx(512, rel=0.1)
    assert lengths[-1] == 4096
    assert lengths[0] >= 1
    # a lognormal of sigma 1 has 84.1 % of its values below e times its median
    assert sum(length < 512 * 2.71828 for length in lengths) / 2001 == pytest.approx(0.841, abs=0.03)


def test_cache_of_the_longest_sequences_that_run_at_a_time() -> None:
    """7B: 28 layers x 2 x 4 heads x 128 x 2 bytes = 57,344 bytes a token; 384 tokens are 3 blocks of 128."""
    config = SHAPES["qwen2.5-7b"]
    assert kv_cache_gib(config, 128, [256] * 256, 256) == pytest.approx(256 * 384 * 57344 * 1.05 / 2**30, abs=1e-3)
    assert kv_cache_gib(config, 128, [256] * 300 + [512], 2) == pytest.approx(
        max(0.125, (384 + 640) * 57344 * 1.05 / 2**30), abs=1e-3
    )
    with pytest.raises(ValueError, match=r"kv_cache_gib: .*num_attention_heads"):
        kv_cache_gib({"num_hidden_layers": 2}, 1, [1], 1)


def test_a_model_without_its_end_token(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, values in {
        "config.json": {"eos_token_id": 2, "vocab_size": 9},
        "generation_config.json": {"eos_token_id": [2, 3], "do_sample": True},
        "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<pad>"},
    }.items():
        (model / name).write_text(json.dumps(values))
    (model / "model.safetensors").write_bytes(b"weights")
    folder = without_end(model, tmp_path / "view")
    found = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert found == {
        "config.json": {"eos_token_id": None, "vocab_size": 9},
        "generation_config.json": {"eos_token_id": None, "do_sample": True},
        "tokenizer_config.json": {"eos_token": None, "pad_token": "<pad>"},
    }
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "model.safetensors").is_symlink()
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == 2
