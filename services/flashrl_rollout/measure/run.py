"""A measurement from settings to table and files.

Knows the order of things and what is checked before minutes are spent; knows nothing of how anything is measured.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flashrl_rollout.measure.progress import Progress
from flashrl_rollout.measure.texts import prompts, read_texts
from flashrl_rollout.model_check import check_model
from flashrl_wire.messages import Quantization

_SAMPLE_TOKENS = 128
_SEED = 0


@dataclass(frozen=True)
class MeasureSettings:
    """`MeasureSettings("M", ("int8", "fp8"), out=Path("skip.toml"))`; `texts` None: the model's own, from one token."""

    model: str
    quantizations: tuple[Quantization, ...]
    texts: Path | None = None
    tokens: int = 4096
    limit_kl: float = math.inf
    has_times: bool = True
    out: Path | None = None
    json_out: Path | None = None


def run(settings: MeasureSettings, console: Console, progress_console: Console | None = None) -> None:
    """Measure, print, write; ValueError of one line for what cannot be measured. Progress goes to stderr by default."""
    texts = _checked(settings)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with Progress(progress_console) as progress:
        progress.piece("loading vLLM")
        from flashrl_rollout.measure import report, subject

        progress.piece(f"loading {settings.model}")
        measured = subject.load(settings.model, settings.quantizations)
        progress.piece(f"sampling {settings.tokens} tokens in bf16")
        asked = prompts(texts, measured.encode, measured.vocab_size)
        drawn = measured.sample(asked, settings.tokens, _SAMPLE_TOKENS, _SEED)
        measurer = measured.measurer(drawn)
        reports = [
            measurer.report(
                quantization,
                subject.kernel_maker(quantization),
                settings.limit_kl,
                has_times=settings.has_times,
                tell=progress.piece,
            )
            for quantization in settings.quantizations
        ]
    limit = None if math.isinf(settings.limit_kl) else settings.limit_kl
    num_tokens = sum(text.num_scored for text in drawn)
    facts = {"model": settings.model, "device": measured.device_name, "tokens": num_tokens, "limit_kl": limit}
    title = f"{settings.model} on {measured.device_name}, {num_tokens} tokens sampled in bf16"
    console.print(report.table(reports, title))
    if settings.out is not None:
        lines = [f"flashrl-rollout measure: {title}", f"limit of the k3 KL: {'none' if limit is None else limit}"]
        settings.out.write_text(report.precision_file(reports, measured.kinds, lines), encoding="utf-8")
        console.print(f"For the service: --precision-file {settings.out}", soft_wrap=True)
    if settings.json_out is not None:
        text = json.dumps(report.as_json(reports, facts), indent=1)
        settings.json_out.write_text(text + "\n", encoding="utf-8")


def _checked(settings: MeasureSettings) -> list[str] | None:
    """The texts, once model and folders are known to be there."""
    check_model(settings.model)
    for name, file in (("out", settings.out), ("json", settings.json_out)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{name}: there is no folder {file.absolute().parent}")
    return None if settings.texts is None else read_texts(settings.texts)
