"""Every recipe loads, says what algorithm.md's table says, and its environment file starts the same thing."""

from pathlib import Path

import pytest

from flashrl_trainer.config import TrainerConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(ROOT.glob("configs/*.toml"))
ENV_FILES = sorted(path for path in ROOT.glob(".env.*") if path.name != ".env.example")

SMALL, LARGE = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-32B"
SERVICE_TIMEOUT_S = 600.0  # the service's own default
GSM8K, DAPO_MATH = "openai/gsm8k", "BytedTsinghua-SIA/DAPO-Math-17k"
# model, data, prompts a step, prompts a mini-batch, samples, prompt tokens, response tokens, overlong buffer, TIS cap
TABLE = {
    "gsm8k_0.5b_int8": (SMALL, GSM8K, 1024, 256, 5, 512, 1024, 512, 2.0),
    "gsm8k_0.5b_fp8": (SMALL, GSM8K, 1024, 256, 5, 512, 1024, 512, 2.0),
    "gsm8k_32b_int8": (LARGE, GSM8K, 32, 32, 4, 512, 1024, 512, 2.0),
    "dapo_0.5b_int8": (SMALL, DAPO_MATH, 1024, 256, 5, 512, 4096, 512, 2.0),
    "dapo_32b_int8": (LARGE, DAPO_MATH, 128, 32, 16, 2048, 20480, 4096, 8.0),
}


def recipe(name: str) -> TrainerConfig:
    return load_config(ROOT / "configs" / f"{name}.toml", [], {})


def env_file(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_header_gives_both_commands(path: Path) -> None:
    config = load_config(path, [], {})
    header = path.read_text().partition("\n[")[0]
    assert f"flashrl-rollout serve --model {config.model.path} --quantization {config.rollout.quantization}" in header
    assert f"train --config configs/{path.name}" in header
    if config.rollout.request_timeout_s != SERVICE_TIMEOUT_S:  # the shorter of the two limits is the one that counts
        assert f"--request-timeout-s {config.rollout.request_timeout_s:g} " in header


@pytest.mark.parametrize("name", TABLE)
def test_recipe_matches_the_table(name: str) -> None:
    config = recipe(name)
    assert TABLE[name] == (
        config.model.path,
        config.data.train,
        config.sampling.prompts_per_step,
        config.optim.mini_batch_prompts,
        config.sampling.samples_per_prompt,
        config.data.max_prompt_tokens,
        config.sampling.max_tokens,
        config.algorithm.overlong_buffer,
        config.algorithm.tis_cap,
    )
    assert config.rollout.quantization == name.rpartition("_")[2]


@pytest.mark.parametrize("name", TABLE)
def test_recipe_keeps_what_all_have_in_common(name: str) -> None:
    config = recipe(name)
    optim = config.optim
    assert (optim.lr, optim.warmup_steps, optim.weight_decay, optim.max_grad_norm) == (1e-6, 0, 0.1, 1.0)
    assert (config.sampling.temperature, config.sampling.max_attempts) == (1.0, 30)
    assert (config.algorithm.update_epochs, config.algorithm.correction) == (1, "token")
    assert (config.eval.every, config.checkpoint.every, config.run.epochs) == (5, 10, 20)


def test_the_two_small_gsm8k_recipes_differ_in_quantization_only() -> None:
    int8, fp8 = recipe("gsm8k_0.5b_int8").model_dump(), recipe("gsm8k_0.5b_fp8").model_dump()
    assert int8.pop("rollout") | {"quantization": "fp8"} == fp8.pop("rollout")
    assert int8 == fp8


def test_there_are_the_three_environment_files() -> None:
    assert [path.name for path in ENV_FILES] == [".env.0.5b_int8", ".env.fp8", ".env.int8"]


@pytest.mark.parametrize("path", ENV_FILES, ids=lambda path: path.name)
def test_environment_file_starts_the_service_its_recipe_expects(path: Path) -> None:
    env = env_file(path)
    assert (ROOT / env["FLASHRL_RECIPE"]).is_file()
    config = load_config(ROOT / env["FLASHRL_RECIPE"], [], {})
    assert env["FLASHRL_ROLLOUT_MODEL"] == config.model.path
    assert env["FLASHRL_ROLLOUT_QUANTIZATION"] == config.rollout.quantization
    assert int(env["FLASHRL_ROLLOUT_MAX_MODEL_LEN"]) == config.data.max_prompt_tokens + config.sampling.max_tokens
    has_the_card_alone = path.name == ".env.int8"  # the small ones leave the trainer room on theirs
    assert env["FLASHRL_ROLLOUT_GPU_MEMORY_UTILIZATION"] == ("0.6" if has_the_card_alone else "0.35")
    assert env["FLASHRL_ROLLOUT_ENFORCE_EAGER"] == "false"


@pytest.mark.parametrize(
    ("name", "recipe_name"),
    [(".env.int8", "gsm8k_32b_int8"), (".env.fp8", "gsm8k_0.5b_fp8"), (".env.0.5b_int8", "gsm8k_0.5b_int8")],
)
def test_environment_file_belongs_to_its_own_recipe(name: str, recipe_name: str) -> None:
    assert env_file(ROOT / name)["FLASHRL_RECIPE"] == f"configs/{recipe_name}.toml"
