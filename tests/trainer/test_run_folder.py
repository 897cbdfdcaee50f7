"""Which folder a run gets, and which one `--resume` means."""

from datetime import datetime
from pathlib import Path

import pytest

from flashrl_trainer.run_folder import choose_folder
from flashrl_trainer.settings import RunSettings

NOW = datetime(2025, 6, 7, 8, 9, 10)


def settings(root: Path, name: str = "") -> RunSettings:
    return RunSettings(dir=str(root), name=name)


def run(root: Path, name: str, *, checkpoint: bool = True) -> Path:
    folder = root / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    if checkpoint:
        (folder / "checkpoints/step-000002").mkdir()
        (folder / "checkpoints/step-000002/trainer.json").touch()
    return folder


def test_new_runs_are_named_by_recipe_and_time(tmp_path: Path) -> None:
    assert choose_folder(settings(tmp_path), "gsm8k", "", NOW) == (tmp_path / "gsm8k-20250607-080910", False)
    assert choose_folder(settings(tmp_path, "mine"), "gsm8k", "", NOW) == (tmp_path / "mine", False)


def test_a_new_run_never_writes_into_an_old_one(tmp_path: Path) -> None:
    run(tmp_path, "mine", checkpoint=False)
    with pytest.raises(ValueError, match=r"^run.name: .*/mine holds a run already; go on with --resume .*/mine or"):
        choose_folder(settings(tmp_path, "mine"), "gsm8k", "", NOW)


def test_a_folder_is_gone_on_with_by_its_path(tmp_path: Path) -> None:
    folder = run(tmp_path, "elsewhere")
    assert choose_folder(settings(tmp_path / "runs"), "gsm8k", str(folder), NOW) == (folder, True)
    with pytest.raises(ValueError, match=r"^--resume: /no/such holds no run$"):
        choose_folder(settings(tmp_path), "gsm8k", "/no/such", NOW)


def test_a_folder_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    folder = run(tmp_path, "young", checkpoint=False)
    assert choose_folder(settings(tmp_path), "gsm8k", str(folder), NOW) == (folder, False)


def test_auto_is_the_newest_run_of_the_recipe_that_can_be_gone_on_with(tmp_path: Path) -> None:
    newest = run(tmp_path, "gsm8k-20250102-000000")
    run(tmp_path, "gsm8k-20250101-235959")  # made later, so newer by its folder's time
    run(tmp_path, "gsm8k-20250103-000000", checkpoint=False)
    run(tmp_path, "gsm8k-2-20250104-000000")  # of the recipe gsm8k-2
    run(tmp_path, "gsm8k-32b-20250104-000000")
    run(tmp_path, "another-20250104-000000")
    assert choose_folder(settings(tmp_path), "gsm8k", "auto", NOW) == (newest, True)


def test_auto_of_a_named_run_is_that_run(tmp_path: Path) -> None:
    run(tmp_path, "mine-20250101-000000")
    assert choose_folder(settings(tmp_path, "mine"), "gsm8k", "auto", NOW) == (tmp_path / "mine", False)
    named = run(tmp_path, "mine")
    assert choose_folder(settings(tmp_path, "mine"), "gsm8k", "auto", NOW) == (named, True)


def test_auto_starts_a_run_where_there_is_none(tmp_path: Path) -> None:
    started = (tmp_path / "runs/gsm8k-20250607-080910", False)
    assert choose_folder(settings(tmp_path / "runs"), "gsm8k", "auto", NOW) == started
