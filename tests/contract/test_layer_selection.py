"""A service that keeps some layers in bf16, and a trainer that learns of it from the layout alone."""

from tests.helpers.workshop import MODEL, Workshop, rows, state, until

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


def test_the_line_at_ready_says_how_much_is_quantized_and_warns_of_nothing(workshop: Workshop) -> None:
    kept = workshop.service(settings={"keep_bf16": ",".join(KEPT)})
    until(lambda: kept.is_ready, kept)
    share = folder_layout(MODEL, "int8", KEPT).quantized_fraction
    assert f", {share:.0%} of them in 8 bits\n" in kept.errors
    assert "--quantize-layers all" not in kept.errors
    nothing = workshop.service(settings={"keep_bf16": "*"})
    until(lambda: nothing.is_ready, nothing)
    assert ", 0% of them in 8 bits\n" in nothing.errors
    assert "quantization: no layer is in int8, all stay bf16; --quantize-layers all" in nothing.errors
