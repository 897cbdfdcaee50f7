"""`compose up --build` from a fresh clone with nothing else set: it trains, ends by itself and leaves its report here.

The output and the times are what docs/benchmarks.md records.
"""

import json
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
from tests.compose.stack import Stack, commands, get, run

pytestmark = [pytest.mark.compose, pytest.mark.timeout(7200)]

ENV_FILES = (".env.int8", ".env.fp8", ".env.0.5b_int8")


@pytest.mark.parametrize("compose", commands() or [["docker", "compose"]], ids=" ".join)
def test_every_combination_of_files_is_valid(clone: Path, compose: list[str]) -> None:
    both = ["-f", "compose.yaml", "-f", "compose.gpu.yaml"]
    for profile in ([], ["--profile", "observability"]):
        run([*compose, *profile, "config", "--quiet"], cwd=clone)
        for file in ENV_FILES:
            run([*compose, "--env-file", file, *profile, *both, "config", "--quiet"], cwd=clone)


@pytest.mark.parametrize("compose", commands() or [["docker", "compose"]], ids=" ".join)
def test_a_missing_env_file_is_one_line_that_says_what_to_do(clone: Path, compose: list[str]) -> None:
    both = ["-f", "compose.yaml", "-f", "compose.gpu.yaml"]
    without = run([*compose, *both, "config", "--quiet"], cwd=clone, check=False)
    assert without.returncode != 0
    (line,) = without.stderr.strip().splitlines()
    assert "choose an env file, such as --env-file .env.0.5b_int8" in line
    missing = run([*compose, "--env-file", ".env.int4", "config", "--quiet"], cwd=clone, check=False)
    assert missing.returncode != 0
    (line,) = missing.stderr.strip().splitlines()
    assert "find env file" in line
    assert ".env.int4" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: PART is not set; build with --build-arg PART=trainer, rollout (CUDA) or rollout-cpu"),
        (["PART=serve"], "error: PART is 'serve'; it must be trainer, rollout (CUDA) or rollout-cpu"),
        (["PART=trainer", "TORCH=rocm"], "error: TORCH is 'rocm'; it must be cpu or cuda"),
    ],
)
def test_an_image_is_not_built_without_being_told_which(clone: Path, arguments: list[str], line: str) -> None:
    options = [word for argument in arguments for word in ("--build-arg", argument)]
    built = run(["docker", "build", *options, "."], cwd=clone, check=False)
    assert built.returncode != 0
    assert line in built.stdout + built.stderr


@pytest.fixture(scope="module")
def stack(clone: Path, command: list[str]) -> Stack:
    return Stack(clone, "flashrl-default", command)


def test_the_default_runs_to_its_end_and_is_closed_to_others(stack: Stack) -> None:
    """One run for all of it, since it takes minutes: what is open, what is not, and how it ends."""
    began = time.monotonic()
    with stack.up("--build") as process:
        rollout = stack.until("service", lambda: stack.running("rollout"), deadline_s=3600, poll_s=0.5)
        started = time.monotonic()
        stack.until("ready service", lambda: _health(stack) == "healthy", poll_s=0.5)
        print(f"\nbuild {started - began:.0f} s, cold start of the service {time.monotonic() - started:.0f} s")
        stack.until("trainer", lambda: stack.running("trainer"), poll_s=0.5)
        _only_with_the_token(stack.url(rollout), stack.token())
        _weights_port_is_not_published(rollout)
        for service in ("rollout", "trainer"):
            _is_confined(stack, service)
        secrets = _secrets(stack)
        stack.finish(process, 3600)
        print(f"up to the end: {time.monotonic() - started:.0f} s after the build")
        log = stack.log.read_text()
        assert not [secret for secret in secrets if secret.decode() in log], "a secret is in the log"
    _report_is_here(stack.folder / "runs" / "tiny_arith")
    assert len(re.findall(r"trainer.*\d+/30 +v\d+", log)) >= 25, "one line a step"
    _no_secret_in_an_image(secrets)


def _health(stack: Stack) -> str:
    one = stack.running("rollout")
    return one["State"].get("Health", {}).get("Status", "") if one else ""


def _only_with_the_token(url: str, token: str) -> None:
    assert get(f"{url}/weights", token).json()["quantization"] == "int8"
    for wrong in ("", "x" * len(token)):
        reply = get(f"{url}/weights", wrong)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthorized")
    assert get(f"{url}/health").status_code == 200


def _weights_port_is_not_published(rollout: dict[str, Any]) -> None:
    """Only the API's port leads from the host into the container."""
    ports = rollout["NetworkSettings"]["Ports"]
    assert [port for port, published in ports.items() if published] == ["8000/tcp"]
    bound = rollout["HostConfig"]["PortBindings"]
    assert list(bound) == ["8000/tcp"]
    if ports["8000/tcp"][0]["HostPort"] != "8001":
        with pytest.raises(httpx.ConnectError):
            get("http://127.0.0.1:8001/")


def _is_confined(stack: Stack, service: str) -> None:
    """Asked from inside, not read from the settings."""
    asks = "cat /proc/1/status; touch /app/x /opt/x /usr/x 2>&1; id -u"
    said = stack.compose("exec", "-T", service, "sh", "-c", asks).stdout
    assert re.findall(r"Cap(?:Inh|Prm|Eff|Bnd|Amb):\s+(\w+)", said) == ["0" * 16] * 5
    assert re.search(r"NoNewPrivs:\s+1", said)
    assert said.count("Read-only file system") == 3
    assert said.split()[-1] == "1000"


def _secrets(stack: Stack) -> list[bytes]:
    """The token and both secret keys, as they lie in the volumes."""
    files = (("rollout", "/keys/service/server.key_secret"), ("trainer", "/keys/trainer/trainer.key_secret"))
    keys = [
        re.findall(r'secret-key = "(.+)"', stack.compose("exec", "-T", service, "cat", file).stdout)
        for service, file in files
    ]
    secrets = [stack.token(), *(key for (key,) in keys)]
    assert all(len(secret) >= 40 for secret in secrets)
    for service in ("rollout", "trainer"):
        environ = json.dumps(stack.container(service)["Config"])
        assert not [secret for secret in secrets if secret in environ]
    return [secret.encode() for secret in secrets]


def _report_is_here(folder: Path) -> None:
    assert (folder / "report" / "index.html").stat().st_size > 1000
    assert (folder / "export" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[0]["eval/accuracy"] < 0.5
    assert rows[-1]["eval/accuracy"] > 0.8


def _no_secret_in_an_image(secrets: list[bytes]) -> None:
    """Neither in its history nor in any file of any layer; and no file that looks like a key of anybody's."""
    for image in ("flashrl-rollout-cpu:local", "flashrl-trainer:local"):
        history = run(["docker", "history", "--no-trunc", image]).stdout
        assert not [secret for secret in secrets if secret.decode() in history]
        size = run(["docker", "image", "inspect", "--format", "{{.Size}}", image]).stdout
        print(f"{image}: {int(size) / 1e6:.0f} MB")
        for name, content in _layer_files(image):
            assert not [secret for secret in secrets if secret in content], name
            assert not re.search(r"(key_secret|/token|/\.env[^/]*|id_rsa|\.netrc)$", name), name


def _layer_files(image: str) -> Iterator[tuple[str, bytes]]:
    """The files of every layer of an image, one after the other; those of more than 64 MiB are left out."""
    with (
        subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as saved,
    ):
        for member in saved:
            if member.name.endswith("layer.tar") or "blobs/" in member.name:
                yield from _files(saved.extractfile(member))


def _files(layer: IO[bytes] | None) -> Iterator[tuple[str, bytes]]:
    with suppress(tarfile.ReadError), tarfile.open(fileobj=layer, mode="r|") as files:  # or it is a manifest
        for file in files:
            content = files.extractfile(file) if file.isfile() and file.size < 64 << 20 else None
            if content is not None:
                yield file.name, content.read()
