"""A service that keeps some layers in bf16, and a trainer that learns of it from the layout alone."""

from tests.helpers.workshop import MODEL, Workshop, rows, state

from flashrl_rollout.scripted_folder import folder_layout

KEPT = ["*.down_proj", "model.layers.0.*"]


def test_trainer_follows_the_services_choice_of_layers(workshop: Workshop) -> None:
    service = workshop.service(keep_bf16=KEPT)
    ended = workshop.trainer(service.url, run__steps=2, eval__every=0).wait()
    assert ended.code == 0, ended.errors
    run, layout = workshop.run_folder(), folder_layout(MODEL, "int8", KEPT)
    stored = {spec.name: spec.storage for spec in layout.tensors}
    assert {name.split(".")[2] for name, storage in stored.items() if storage == "int8_rows"} == {"1", "2", "3"}
    weights = service.weights()
    assert (weights["version"], weights["layout_hash"]) == (2, layout.hash)
    assert weights["digest"] == state(run, 2)["digest"]
    assert weights["quantized_fraction"] == layout.quantized_fraction
    assert 0 < layout.quantized_fraction < folder_layout(MODEL, "int8").quantized_fraction
    assert [row["sync/kind"] for row in rows(run)] == [0, 0]
