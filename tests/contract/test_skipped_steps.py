"""A model whose forward overflows: steps are recorded and left out, and the run stops with a checkpoint."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from tests.helpers.workshop import MODEL, Workshop, rows, state


def overflowing(folder: Path) -> Path:
    """The tiny model with an embedding that is finite, and whose logits in fp32 are not."""
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(MODEL / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e37
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 1e3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_stops_after_so_many_updates_without_a_finite_loss(workshop: Workshop) -> None:
    model = overflowing(workshop.folder / "overflowing")
    service = workshop.service(folder=str(model))
    settings = {"model__path": model, "optim__max_skipped_steps": 2, "eval__every": 0, "checkpoint__every": 0}
    ended = workshop.trainer(service.url, **settings).wait()
    assert (ended.code, "Traceback" in ended.errors) == (1, False), ended.errors
    last = ended.errors.splitlines()[-1]
    assert last.startswith("error: optim.max_skipped_steps: 2 updates in a row were left out (loss nan, ")
    run = workshop.run_folder()
    assert [(row["step"], row["loss"], row["train/skipped_steps"]) for row in rows(run)] == [(1, None, 1), (2, None, 1)]
    first = state(run, 2)
    assert (first["step"], first["published"]) == (2, True)

    resumed = workshop.trainer(service.url, f"--resume={run}", **settings).wait()
    assert resumed.code == 1
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert state(run, 4)["digest"] == first["digest"], "weights that nothing could be learned from have not moved"
