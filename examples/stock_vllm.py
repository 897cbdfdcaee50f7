"""Take a stock vLLM server from one checkpoint to another by a delta, through vLLM's own weight routes.

    VLLM_SERVER_DEV_MODE=1 vllm serve A --quantization flashrl_int8 --dtype bfloat16 \\
        --weight-transfer-config '{"backend": "flashrl"}'
    python examples/stock_vllm.py A B [--url http://127.0.0.1:8000] [--stage example] [--prompt TEXT]

A and B are folders of the same architecture; the server and this program are one user's on one machine. Prints what was
sent and, with `--prompt`, the greedy continuation before and after. docs/stock_vllm.md has the limits.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from flashrl_rollout import stored_state
from flashrl_rollout.stored_state import Parts
from flashrl_wire import codec
from flashrl_wire.delta import diff
from flashrl_wire.layout import TensorSpec, WeightLayout
from flashrl_wire.messages import Manifest

TIMEOUT_S = 600.0


class Server:
    """vLLM's routes; a refusal ends this program with vLLM's own words."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def post(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """The reply's JSON."""
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self._url}{route}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{route}: {error.code}: {error.read().decode(errors='replace')}") from error

    def greedy(self, model: str, prompt: str) -> str:
        """The greedy continuation."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 32}
        return str(self.post("/v1/completions", body)["choices"][0]["text"])


def main() -> int:
    """0 once the server samples from B."""
    arguments = _arguments()
    server, stage = Server(arguments.url), _stage(arguments.stage)
    if arguments.prompt:
        print("before:", repr(server.greedy(arguments.model or str(arguments.old), arguments.prompt)))
    server.post("/init_weight_transfer_engine", {"init_info": {"stage": arguments.stage}})
    state = json.loads((stage / "weights.json").read_text())
    file = f"{os.getpid()}.update"
    try:
        manifest = write_update(stage / file, state, arguments.old, arguments.new)
        push(server, file, manifest)
    finally:
        (stage / file).unlink(missing_ok=True)
    print(f"version {manifest.version}, digest {manifest.digest}: {manifest.changed_elements} elements changed")
    if arguments.prompt:
        print("after: ", repr(server.greedy(arguments.model or str(arguments.old), arguments.prompt)))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="A")
    parser.add_argument("new", type=Path, metavar="B")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--stage", default="example", help="name of the folder in shared memory")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--model", default="", help="the name under which vLLM serves A")
    return parser.parse_args()


def _stage(name: str) -> Path:
    return Path(os.environ.get("FLASHRL_ROLLOUT_STAGE_ROOT", "/dev/shm")) / f"flashrl-{os.getuid()}-{name}"


def write_update(file: Path, state: dict[str, Any], old: Path, new: Path) -> Manifest:
    """Write the delta from `old` to `new`; the program ends here unless the server holds `old`."""
    layout = WeightLayout.of(TensorSpec.model_validate(spec) for spec in state["tensors"])
    before, after = (stored_state.read_parts(folder, layout) for folder in (old, new))
    base, target = _digest(layout, before), _digest(layout, after)
    if base != state["digest"]:
        raise SystemExit(f"the server holds {state['digest']}, {old} is {base}")
    found = [diff(part.name, before[part.name], after[part.name]) for part in layout.parts()]
    encoded = codec.encode(change for change, _ in filter(None, found))
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.writelines(encoded.payloads)
    return Manifest(
        kind="delta",
        run_id="example",
        base_version=state["version"],
        base_digest=base,
        version=state["version"] + 1,
        digest=target,
        layout_hash=layout.hash,
        changed_elements=encoded.changed_elements,
        segments=encoded.segments,
        chunks=encoded.chunks,
    )


def _digest(layout: WeightLayout, parts: Parts) -> str:
    return stored_state.combined(layout, stored_state.digests(parts))


def push(server: Server, file: str, manifest: Manifest) -> None:
    """Stop sampling, replace the weights, go on."""
    started = time.monotonic()
    server.post("/pause?mode=wait")  # finishes running requests and forgets keys and values of the old weights
    try:
        server.post("/start_weight_update")
        server.post("/update_weights", {"update_info": {"file": file, "manifest": manifest.model_dump(mode="json")}})
        server.post("/finish_weight_update", {"weight_version": str(manifest.version)})
    finally:
        server.post("/resume")
    print(f"{manifest.wire_bytes} bytes, paused for {(time.monotonic() - started) * 1e3:.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
