"""Coverage-guided fuzzing of everything that reads a stranger's bytes: frames, manifests, chunks, streams, transfers.

    python -m pip install --target /tmp/atheris atheris
    PYTHONPATH=.:/tmp/atheris python -m benchmarks.fuzz_wire --minutes 10

atheris is no dependency of the project: it brings its own libFuzzer. Each target gets an equal share of the time in a
process of its own. Ends with 1 for any exception that is not a refusal, an input that takes longer than ten seconds, or
one for which more memory is allocated than `CAP_BYTES`. Knows processes and libFuzzer; what is tried is in
`fuzz_targets`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

CAP_BYTES = 8 << 20
"""What one input of at most 64 KiB may allocate in Python and numpy: a block, a copy of it, and some change."""
RSS_LIMIT_MIB = 2048
INPUT_SECONDS, INPUT_BYTES = 10, 1 << 16
_STATS = re.compile(r"stat::(\w+):\s+(\d+)")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+)")


@dataclass(frozen=True)
class Outcome:
    """What one target showed; `coverage` counts edges of instrumented code, `peak_bytes` is of the worst input."""

    target: str
    executions: int
    coverage: int
    features: int
    peak_rss_mib: int
    peak_bytes: int
    failure: str


def fuzz(target: str, folder: Path, seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["flashrl_wire", "flashrl_rollout", "benchmarks.fuzz_targets"]):
        from benchmarks import fuzz_targets

    def body(data: bytes) -> None:
        if target in fuzz_targets.BYTES:
            fuzz_targets.BYTES[target](data)
        else:
            fuzz_targets.DRAWS[target](atheris.FuzzedDataProvider(data))

    corpus = folder / target
    corpus.mkdir()
    for number, (name, data) in enumerate(fuzz_targets.seeds()):
        if name == target:
            (corpus / f"seed-{number}").write_bytes(data)
    peak_file, most = folder / f"{target}.peak", 0
    body(b"")  # what is loaded at the first call is not the input's
    tracemalloc.start()

    def measured(data: bytes) -> None:
        nonlocal most
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        body(data)
        used = tracemalloc.get_traced_memory()[1] - before
        if used > most:
            most = used
            peak_file.write_text(str(most))
        assert used <= CAP_BYTES, f"{used} bytes for an input of {len(data)}"

    limits = [f"-rss_limit_mb={RSS_LIMIT_MIB}", f"-timeout={INPUT_SECONDS}", f"-max_len={INPUT_BYTES}"]
    run = [f"-max_total_time={seconds}", "-print_final_stats=1", f"-artifact_prefix={folder}/{target}-"]
    atheris.Setup([sys.argv[0], *limits, *run, str(corpus)], measured)
    atheris.Fuzz()


def run_target(target: str, folder: Path, seconds: int) -> Outcome:
    """Fuzz in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fuzz_wire", "--target", target, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False, env=os.environ
    )
    log = done.stderr + done.stdout
    (folder / f"{target}.log").write_text(log)
    stats = {name: int(value) for name, value in _STATS.findall(log)}
    coverage, features = (int(value) for value in (_COVERAGE.findall(log) or [(0, 0)])[-1])
    peak = folder / f"{target}.peak"
    return Outcome(
        target=target,
        executions=stats.get("number_of_executed_units", 0),
        coverage=coverage,
        features=features,
        peak_rss_mib=stats.get("peak_rss_mb", 0),
        peak_bytes=int(peak.read_text()) if peak.exists() else 0,
        failure="" if done.returncode == 0 else log[-2000:],
    )


def main() -> int:
    """0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--keep", type=Path, help="folder for corpora, logs and what broke something")
    parser.add_argument("--json", type=Path)
    for name, kind in (("--target", str), ("--folder", Path), ("--seconds", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.target:
        fuzz(args.target, args.folder, args.seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        targets = ("frame", "manifest", "chunk", "stream", "transfer")
        outcomes = []
        for target in targets:
            outcomes.append(run_target(target, folder, max(1, int(args.minutes * 60 / len(targets)))))
            print(outcomes[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 1 if any(outcome.failure or not outcome.executions for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
