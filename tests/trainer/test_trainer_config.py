"""Settings: which layer wins, what is refused and how the refusal reads. Knows nothing of what a setting does."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flashrl_trainer.config import TrainerConfig, dump_toml, load_config, settings_markdown

MINIMAL = ["model.path=m", "data.train=t", "data.eval=e"]


def load(*overrides: str, environ: dict[str, str] | None = None) -> TrainerConfig:
    return load_config(None, [*MINIMAL, *overrides], environ or {})


def refusal(*overrides: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load(*overrides, environ=environ)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[model]\npath='m'\n[data]\ntrain='t'\neval='e'\n[optim]\nlr=1e-3\nbeta1=0.5\nbeta2=0.5\n")
    environ = {"FLASHRL_TRAINER_OPTIM__BETA1": "0.6", "FLASHRL_TRAINER_OPTIM__BETA2": "0.6", "PATH": "/bin"}
    optim = load_config(file, ["optim.beta2=0.7"], environ).optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.weight_decay) == (1e-3, 0.6, 0.7, 0.1)


def test_the_later_flag_wins() -> None:
    assert load("run.steps=1", "run.steps=2").run.steps == 2


def test_required_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"^model\.path: is required; data\.train: is required$"):
        load_config(None, [], {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.tis_cap=0.5", "algorithm.tis_cap: must be >= 1, got 0.5 (from --set algorithm.tis_cap=0.5)"),
        ("algorithm.clip_low=1", "algorithm.clip_low: must be < 1, got 1 (from --set algorithm.clip_low=1)"),
        ("run.steps=1.5", "run.steps: must be a whole number, got 1.5 (from --set run.steps=1.5)"),
        ("run.steps=true", "run.steps: must be a whole number, got True (from --set run.steps=true)"),
        ("run.steps=", "run.steps: must be a whole number, got '' (from --set run.steps=)"),
        ("optim.lr=nan", "optim.lr: must be a finite number, got nan (from --set optim.lr=nan)"),
        ("optim.lr=fast", "optim.lr: must be a number, got 'fast' (from --set optim.lr=fast)"),
        ("eval.greedy=yes", "eval.greedy: must be true or false, got 'yes' (from --set eval.greedy=yes)"),
        ("run.wandb=no", "run.wandb: must be 'auto', 'online', 'offline' or 'off', got 'no' (from --set run.wandb=no)"),
        ("model.path=", "model.path: must not be empty, got '' (from --set model.path=)"),
        ("run.steps", "--set run.steps: must be section.key=value"),
        ("steps=5", "--set steps=5: must be section.key=value"),
    ],
)
def test_a_bad_value_is_one_line_with_key_value_and_origin(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("algorithm.tis_cpa=2", "algorithm.tis_cap"),
        ("algoritm.tis_cap=2", "algorithm.tis_cap"),
        ("sampling.lr=2", "optim.lr"),
        ("rollout.url=http://a", "rollout.urls"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override: str, suggestion: str) -> None:
    key = override.partition("=")[0]
    assert refusal(override).startswith(f"{key}: unknown setting; did you mean {suggestion}?")


def test_a_key_like_no_other_gets_no_suggestion() -> None:
    assert refusal("zzz.qqq=1") == "zzz.qqq: unknown setting (from --set zzz.qqq=1)"


def test_a_misspelt_variable_names_its_origin() -> None:
    message = refusal(environ={"FLASHRL_TRAINER_RUN__SETPS": "3"})
    assert message == "run.setps: unknown setting; did you mean run.steps? (from FLASHRL_TRAINER_RUN__SETPS)"


def test_a_variable_without_the_delimiter_is_refused() -> None:
    assert refusal(environ={"FLASHRL_TRAINER_STEPS": "3"}).startswith("FLASHRL_TRAINER_STEPS: must be")


@pytest.mark.parametrize("override", ["sampling.top_p=0.9", "sampling.top_k=50", "sampling.min_p=0.1"])
def test_sampling_that_biases_the_ratio_is_refused_with_the_reason(override: str) -> None:
    message = refusal(override)
    assert message.startswith(override.partition("=")[0])
    assert "importance ratio would be biased" in message


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("sampling.max_tokens=512",), "algorithm.overlong_buffer"),
        (("optim.mini_batch_prompts=1025",), "optim.mini_batch_prompts"),
        (("optim.max_tokens_per_micro_batch=1535",), "optim.max_tokens_per_micro_batch"),
        (("algorithm.mask_low=1", "algorithm.mask_high=1"), "algorithm.mask_low"),
        (("data.eval=",), "data.eval"),
        (("eval.every=0", "run.stop_accuracy=0.9"), "run.stop_accuracy"),
        (("data.prompt_template=Solve it.",), "data.prompt_template"),
        (("rollout.urls=ftp://a",), "rollout.urls"),
        (("rollout.urls=[]",), "rollout.urls"),
        (("rollout.urls=http://a,http://a/",), "rollout.urls"),
        (("run.name=../up",), "run.name"),
        (("run.name=..",), "run.name"),
    ],
)
def test_settings_that_contradict_each_other_name_the_one_to_change(overrides: tuple[str, ...], key: str) -> None:
    assert refusal(*overrides).startswith(f"{key}: ")


def test_contradictions_end_where_they_should() -> None:
    assert load("sampling.max_tokens=513").sampling.max_tokens == 513
    assert load("sampling.max_tokens=512", "algorithm.overlong=none").sampling.max_tokens == 512
    assert load("optim.max_tokens_per_micro_batch=1536").optim.max_tokens_per_micro_batch == 1536
    assert load("data.eval=", "eval.every=0").data.eval == ""


def test_text_settings_take_bare_text_that_looks_like_a_number() -> None:
    assert load("run.name=2026").run.name == "2026"
    assert load('run.name="quoted"').run.name == "quoted"


def test_replicas_come_as_a_list_or_with_commas() -> None:
    expected = ("http://a:1", "http://b:2")
    assert load('rollout.urls=["http://a:1", "http://b:2/"]').rollout.urls == expected
    assert load(environ={"FLASHRL_TRAINER_ROLLOUT__URLS": "http://a:1, http://b:2"}).rollout.urls == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[run", "not valid TOML"),
        ("run = 5", "run: must be a table, got 5"),
        ("[run]\nsteps = '5'", "run.steps: must be a whole number, got '5'"),
        ("tis_cap = 3", "tis_cap: unknown setting; did you mean algorithm.tis_cap?"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        load_config(file, [], {})
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config file .*absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml", [], {})


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().run.steps = 3  # type: ignore[misc]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    number=st.floats(0, 1e300, exclude_min=True),
    flag=st.booleans(),
)
def test_a_dump_reads_back_to_the_same_values(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, flag: bool
) -> None:
    raw = load("rollout.urls=http://a,http://b").model_dump()
    raw["data"] |= {"train": text, "prompt_template": text + "{question}\n"}
    raw["optim"]["lr"], raw["eval"]["greedy"] = number, flag
    config = TrainerConfig.model_validate(raw)
    file = tmp_path_factory.getbasetemp() / "dump.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(file, [], {}) == config


def test_the_generated_page_has_every_setting_with_its_limits() -> None:
    page = settings_markdown()
    assert page.count("\n| `") == sum(len(section) for section in load().model_dump().values())
    assert "| `tis_cap` | `2.0` | >= 1 | " in page
    assert "| `path` | required | " in page
    assert '| `quantization` | `"int8"` | `int8`, `fp8`, `none` | ' in page
