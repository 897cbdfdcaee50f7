"""Settings from a TOML file, the environment and flags, later ones winning, every mistake one line that names the key.

It does not know what any setting means: `settings` holds names, defaults and ranges.

    configs/gsm8k_0.5b_int8.toml                  [algorithm]  tis_cap = 2.0
    FLASHRL_TRAINER_ALGORITHM__TIS_CAP=4          two underscores between section and key
    --set algorithm.tis_cap=8                     a TOML value, or bare text where the setting is text
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flashrl_trainer.config_errors import one_line, plain
from flashrl_trainer.settings import TrainerConfig

__all__ = ["ENV_PREFIX", "TrainerConfig", "dump_toml", "load_config", "settings_markdown"]

ENV_PREFIX = "FLASHRL_TRAINER_"


def load_config(path: Path | None, overrides: list[str], environ: Mapping[str, str]) -> TrainerConfig:
    """Resolves the file `path` < `environ` < `overrides` (`section.key=value`); ValueError of one line if it cannot."""
    layers = [(str(path), _read_toml(path))] if path else []
    layers += [(name, _nested(key, text)) for name, key, text in _from_environ(environ)]
    layers += [(f"--set {override}", _nested(*_split_override(override))) for override in overrides]
    values: dict[str, Any] = {section: {} for section in TrainerConfig.model_fields}
    origins: dict[str, str] = {}  # "algorithm.tis_cap" -> where its value came from
    for origin, layer in layers:
        _merge(values, layer, origin, origins)
    try:
        return TrainerConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_line(error, _known_keys(), origins)) from None


def dump_toml(config: TrainerConfig) -> str:
    """The resolved configuration as TOML that `load_config` reads back to an equal value."""
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())
        for section, values in config.model_dump().items()
    )


def settings_markdown() -> str:
    """A table per section with every setting's default, range and meaning."""
    return "\n".join(_section_markdown(name, _section(name)) for name in TrainerConfig.model_fields)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config file {path}: {error.strerror or error}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"config file {path}: not valid TOML: {' '.join(str(error).split())}") from None


def _from_environ(environ: Mapping[str, str]) -> Iterable[tuple[str, str, str]]:
    """(variable, "section.key", text) of each of our variables, in a fixed order."""
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            section, separator, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
            if not separator:
                raise ValueError(f"{name}: must be {ENV_PREFIX}SECTION__KEY, two underscores between section and key")
            yield name, f"{section}.{key}", environ[name]


def _split_override(override: str) -> tuple[str, str]:
    key, separator, text = override.partition("=")
    if not separator or "." not in key:
        raise ValueError(f"--set {override}: must be section.key=value")
    return key.strip(), text.strip()


def _nested(key: str, text: str) -> dict[str, Any]:
    section, _, name = key.partition(".")
    field = _section(section).model_fields.get(name) if section in TrainerConfig.model_fields else None
    return {section: {name: _parse(text, field)}}


def _parse(text: str, field: FieldInfo | None) -> Any:
    """The TOML value `text` spells; `text` itself if it spells none, or a number where the setting is text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if set(parsed) != {"value"}:  # the text held a line break and more keys
        return text
    value = parsed["value"]
    wants_literal = field is not None and field.annotation in (int, float, bool)
    return value if wants_literal or isinstance(value, str | list) else text


def _merge(values: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str]) -> None:
    for section, content in layer.items():
        if isinstance(content, dict) and isinstance(values.setdefault(section, {}), dict):
            values[section].update(content)
            origins.update({f"{section}.{key}": origin for key in content})
        else:
            values[section] = content
            origins[section] = origin


def _section(name: str) -> type[BaseModel]:
    section = TrainerConfig.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return section


def _known_keys() -> list[str]:
    return [f"{section}.{key}" for section in TrainerConfig.model_fields for key in _section(section).model_fields]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # JSON's escapes are TOML's, except that TOML wants this one escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _section_markdown(name: str, section: type[BaseModel]) -> str:
    rows = [
        f"| `{key}` | {_default(field)} | {_allowed(field)} | {field.description} |"
        for key, field in section.model_fields.items()
    ]
    heading = f"## [{name}]\n\n{section.__doc__}\n\n| setting | default | allowed | meaning |\n|---|---|---|---|\n"
    return heading + "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_toml(field.default)}`"


def _allowed(field: FieldInfo) -> str:
    choices = getattr(field.annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in choices)
    limits = [
        f"{sign} {plain(getattr(limit, name))}"
        for limit in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(limit, name)
    ]
    return " and ".join(limits)
