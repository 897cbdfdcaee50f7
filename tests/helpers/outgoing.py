"""A test's update in the form in which the real publisher takes it. Knows both forms, and nothing of sockets."""

from tests.helpers.wire_trainer import Update

from flashrl_trainer.outgoing import Held, Outgoing


def outgoing(update: Update) -> Outgoing:
    """The same bytes under the same declaration."""
    manifest = update.manifest
    return Outgoing(
        base=Held(manifest.base_version, manifest.base_digest) if manifest.kind == "delta" else None,
        target=Held(manifest.version, manifest.digest),
        layout_hash=manifest.layout_hash,
        changed_elements=manifest.changed_elements,
        segments=manifest.segments,
        chunks=manifest.chunks,
        payloads=update.payloads,
    )
