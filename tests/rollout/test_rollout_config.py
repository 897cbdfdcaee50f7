"""Settings from file, environment and flags: the later wins, and every mistake is one line that names the key."""

from pathlib import Path

import pytest

from flashrl_rollout.config import RolloutConfig, load_config


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'model = "a"\nport = 1\nweights_port = 2\nseed = 3\nenforce_eager = true\n')
    environ = {"FLASHRL_ROLLOUT_PORT": "10", "FLASHRL_ROLLOUT_SEED": "30", "OTHER": "x"}
    config = load_config(file, environ, {"seed": "300"})
    assert (config.model, config.weights_port, config.port, config.seed) == ("a", 2, 10, 300)
    assert config.enforce_eager is True


def test_environment_is_text_of_every_type() -> None:
    environ = {
        "FLASHRL_ROLLOUT_MODEL": "m",
        "FLASHRL_ROLLOUT_ENFORCE_EAGER": "false",
        "FLASHRL_ROLLOUT_GPU_MEMORY_UTILIZATION": "0.75",
        "FLASHRL_ROLLOUT_CHECKPOINT_ROOTS": "/a:/b",
        "FLASHRL_ROLLOUT_KEYS_DIR": "/k",
    }
    config = load_config(None, environ, {})
    assert (config.enforce_eager, config.gpu_memory_utilization) == (False, 0.75)
    assert (config.checkpoint_roots, config.keys_dir) == ((Path("/a"), Path("/b")), Path("/k"))


def test_roots_include_the_model_where_it_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert load_config(None, {}, {"model": f"{tmp_path}/m"}).roots() == (tmp_path / "m",)
    assert load_config(None, {}, {"model": "org/name"}).roots() == ()


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in RolloutConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "model: is required"),
        ({"model": ""}, "model: "),
        ({"port": "abc"}, r"port: .* got 'abc' \(from --port\)"),
        ({"port": "65536"}, "port: should be less than or equal to 65535"),
        ({"port": "7", "weights_port": "7"}, "weights_port: must differ from port = 7"),
        ({"quantization": "int4"}, "quantization: should be 'int8', 'fp8' or 'none'"),
        ({"gpu_memory_utilization": "1.5"}, "gpu_memory_utilization: "),
        ({"kv_cache_gib": "nan"}, "kv_cache_gib: "),
        ({"max_num_seqs": "0"}, "max_num_seqs: "),
        ({"request_timeout_s": "0"}, r"request_timeout_s: .*from --request-timeout-s"),
        ({"credit_mib": "1"}, "credit_mib: "),
        ({"commit_mode": "abort"}, "commit_mode: should be 'keep' or 'drain'"),
        ({"audit_evry": "1"}, "audit_evry: unknown setting; did you mean audit_every?"),
    ],
)
def test_mistake_is_one_line_that_names_the_setting(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        load_config(None, {}, ({"model": "m"} if flags else {}) | flags)
    assert "\n" not in str(error.value)


def test_origin_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'model = "m"\nprot = 1\n')
    with pytest.raises(ValueError, match=r"prot: unknown setting; did you mean port\? \(from .*c\.toml\)"):
        load_config(file, {}, {})
    with pytest.raises(ValueError, match=r"(?s)seed: .*from FLASHRL_ROLLOUT_SEED"):
        load_config(None, {"FLASHRL_ROLLOUT_MODEL": "m", "FLASHRL_ROLLOUT_SEED": "-1"}, {})


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for file, message in ((tmp_path / "none.toml", "No such file"), (write(tmp_path / "bad.toml", "a = "), "bad.toml")):
        with pytest.raises(ValueError, match=f"config: .*{message}"):
            load_config(file, {}, {})


def test_settings_cannot_change_later() -> None:
    config = load_config(None, {}, {"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, "port", 1)  # noqa: B010 (mypy knows that it is frozen)
