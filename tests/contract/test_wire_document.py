"""The client that was written from docs/wire.md, against a service process: the document is enough."""

from pathlib import Path

from tests.contract import written_from_the_document as document
from tests.contract.written_from_the_document import Client, State, parts_of
from tests.faults import served
from tests.faults.served import Stored
from tests.helpers.forked import ServiceProgram, free_ports

from flashrl_wire.digest import bits


def patterns(stored: Stored) -> State:
    """As the client holds them."""
    flat = {name: bits(values.view(-1)).numpy() for name, values in stored.parts.items()}
    return {name: values.view(f"u{values.itemsize}") for name, values in flat.items()}


def test_it_shares_no_code() -> None:
    assert "flashrl" not in Path(document.__file__).read_text().split('"""', 2)[2]


def test_deltas_of_a_client_that_has_only_read_the_document(tmp_path: Path) -> None:
    service = ServiceProgram(tmp_path / "service", free_ports(2), settings={"audit_every": 1}, rows=4096)
    try:
        while not service.is_ready:
            assert not service.ends_within(0.01), service.errors
        client, old = Client(service.url), served.first(rows=4096)
        parts = parts_of(client.ask("GET", "/weights/layout")[1])
        far = Stored(1, {name: values.clone() for name, values in old.parts.items()}, old.layout)
        for index in (0, 3, 70_000):  # the last gap does not fit 16 bits
            bits(far.parts["layers.0.down.weight"].view(-1))[index] ^= 1
        for before, after in ((old, far), (far, far.moved(0.3))):
            assert document.digest(parts, patterns(before)) == service.weights()["digest"]
            changed = sum(int((patterns(before)[p.name] != patterns(after)[p.name]).sum()) for p in parts)
            reply = client.publish(parts, patterns(before), patterns(after), "another-trainer")
            assert (reply["version"], reply["digest"]) == (after.version, after.digest)
            assert reply["changed_elements"] == changed
            served.assert_serves(service, after)
    finally:
        service.kill()
