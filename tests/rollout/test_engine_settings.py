"""The environment of an engine's processes."""

import os

import pytest

from flashrl_rollout.engine_settings import EngineSettings, environment


def test_threads_are_unbound_only_where_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in EngineSettings("m").environment()
    variables = EngineSettings("m", threads=2).environment()
    assert (variables["VLLM_CPU_OMP_THREADS_BIND"], variables["OMP_NUM_THREADS"]) == ("nobind", "2")
    assert "VLLM_PLUGINS" not in variables


def test_outer_settings_of_logging_win_and_a_list_of_plugins_gains_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    variables = EngineSettings("m").environment()
    assert variables["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert variables["VLLM_PLUGINS"] == "other,flashrl"


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_TEST_KEPT", "old")
    monkeypatch.delenv("FLASHRL_TEST_NEW", raising=False)
    with environment({"FLASHRL_TEST_KEPT": "new", "FLASHRL_TEST_NEW": "1"}):
        assert (os.environ["FLASHRL_TEST_KEPT"], os.environ["FLASHRL_TEST_NEW"]) == ("new", "1")
    assert os.environ["FLASHRL_TEST_KEPT"] == "old"
    assert "FLASHRL_TEST_NEW" not in os.environ


def test_the_cache_has_the_size_asked_for_on_every_device_and_on_the_cpu_a_default() -> None:
    asked, silent = EngineSettings("m", kv_cache_gib=0.5), EngineSettings("m", engines=4)
    assert asked.kv_cache_bytes(is_cpu=True) == asked.kv_cache_bytes(is_cpu=False) == 1 << 29
    assert silent.kv_cache_bytes(is_cpu=True) == 1 << 28  # a quarter of 1 GiB for each of four engines
    assert silent.kv_cache_bytes(is_cpu=False) is None  # what gpu_memory_utilization leaves
