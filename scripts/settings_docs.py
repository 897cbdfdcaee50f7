"""`python scripts/settings_docs.py`: writes docs/settings.md from the settings themselves; a test holds it to them.

Knows where names, defaults, ranges and meanings are declared; knows nothing of what any setting does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from flashrl_rollout.config import RolloutConfig
from flashrl_trainer.config import settings_markdown

PATH = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
INTRODUCTION = """\
# Settings

Written by `python scripts/settings_docs.py`; edit the descriptions in `services/flashrl_rollout/config.py` and
`trainer/flashrl_trainer/settings.py` instead. Later sources win: TOML file, environment variable, flag. An unknown
name or a value out of range stops the program at its start with one line that names it.
"""
SERVICE = """\
## The rollout service

| file (`--config FILE.toml`) | environment | flag |
|---|---|---|
| `max_model_len = 1536` | `FLASHRL_ROLLOUT_MAX_MODEL_LEN=1536` | `--max-model-len 1536` |

The API token is no setting: it comes from `FLASHRL_TOKEN`, or from the file that `token_file` names.
"""
TRAINER = """\
## The trainer

| file (`--config FILE.toml`) | environment | flag |
|---|---|---|
| `[algorithm]` `tis_cap = 4.0` | `FLASHRL_TRAINER_ALGORITHM__TIS_CAP=4.0` | `--set algorithm.tis_cap=4.0` |

The API token comes from the file that `rollout.token_file` names, or from `FLASHRL_TOKEN`.
"""


def main() -> None:
    """Write the file."""
    PATH.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole of docs/settings.md."""
    trainer = settings_markdown().replace("## [", "### [")
    return "\n".join([INTRODUCTION, SERVICE, table(RolloutConfig.model_fields), TRAINER, trainer])


def table(fields: Mapping[str, FieldInfo]) -> str:
    """A row a setting of the service."""
    rows = (
        f"| `{name}` | {default(field)} | {allowed(field)} | {field.description} |" for name, field in fields.items()
    )
    return "\n".join(["| setting | default | allowed | meaning |", "|---|---|---|---|", *rows, ""])


def default(field: FieldInfo) -> str:
    """`required`, `none`, or the value as it stands in TOML."""
    if field.is_required():
        return "required"
    if field.default in (None, ()):
        return "none"
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f'`"{value}"`' if isinstance(field.default, str | Path) else f"`{value}`"


def allowed(field: FieldInfo) -> str:
    """The choices, or the limits."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    limits = ((sign, getattr(limit, name, None)) for limit in field.metadata for name, sign in SIGNS.items())
    return " and ".join(f"{sign} {value}" for sign, value in limits if value is not None)


if __name__ == "__main__":
    main()
