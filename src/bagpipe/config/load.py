"""From TOML and `--set` to a checked section; one error lists every mistake in the file's terms.

pydantic finds the mistakes, and this module words them: the key as it stands in the file, its
value, what it must be, and for an unknown key the nearest right one. Values are checked strictly:
1 is no string, "1" no number.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bagpipe.config.base import MEMORY_PATTERN, SHARE_PATTERN, Section
from bagpipe.errors import ConfigError

S = TypeVar("S", bound=Section)
_MAX_SHOWN = 100
_PATTERNS = {
    MEMORY_PATTERN: "input should be memory such as '4GiB' or '4GB'",
    SHARE_PATTERN: "input should be a share such as '2%'",
}
_OPENS_TOML = ("[", "{", '"', "'")


def load_config(
    model: type[S], path: Path, overrides: Sequence[str] = (), *, only: Sequence[str] | None = None
) -> S:
    """Reads a TOML file, applies `section.key=value` overrides and checks the whole.

    Args:
        model: The section that the file as a whole is.
        path: The file.
        overrides: Each is `section.key=value`. The value is TOML, or else a string as it stands.
        only: The top-level keys to look at; all of them by default.

    Returns:
        The checked section.

    Raises:
        ConfigError: The file can't be read, or has mistakes, all of which it lists.
    """
    settings = read_toml(path)
    apply_overrides(settings, overrides)
    if only is not None:
        settings = {key: value for key, value in settings.items() if key in only}
    return check_config(model, settings, source=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: The file can't be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    # besides TOMLDecodeError, which is one: a number of thousands of digits; lists within lists
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def check_config(model: type[S], settings: dict[str, Any], *, source: str) -> S:
    """Makes the section that settings describe.

    Args:
        model: The section.
        settings: Its keys and values, as TOML has them.
        source: Where the settings come from, for the error.

    Raises:
        ConfigError: The settings have mistakes, all of which it lists.
    """
    try:
        # as JSON, since only there pydantic's strict mode takes a list for a tuple, a string for a
        # path
        return model.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        mistakes = list(dict.fromkeys(_mistakes(model, settings, error.errors(include_url=False))))
    heading = f"{source}: {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
    raise ConfigError("\n".join([heading, *(f"  {mistake}" for mistake in mistakes)]))


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets keys as `section.key=value` says, in place.

    Raises:
        ConfigError: An override is not of that form.
    """
    for override in overrides:
        _apply(settings, override)


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not all([*sections, name]):
        raise ConfigError(
            f"--set {override}: must be section.key=value, e.g. train.batch_size=4096"
        )
    table = settings
    for depth, section in enumerate(sections):
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {override}: {'.'.join(sections[: depth + 1])} is a value, not a section"
            )
    table[name] = _parse_value(override, text.strip())


def _parse_value(override: str, text: str) -> object:
    """Reads TOML, or else a string that a shell left without quotes, such as 2% or a path."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        # what starts like a list, a table or a quoted string was meant to be TOML
        if text and not text.startswith(_OPENS_TOML):
            return text
        raise ConfigError(f"--set {override}: the value is not TOML: {error}") from error
    if len(read) > 1:
        raise ConfigError(f"--set {override}: is more than one key: give each a --set of its own")
    return read["value"]


def _mistakes(
    model: type[Section], settings: dict[str, Any], errors: Sequence[ErrorDetails]
) -> Iterator[str]:
    by_path: dict[str, list[str]] = {}
    for error in errors:
        path, value = _locate(settings, error["loc"], missing=error["type"] == "missing")
        if error["type"] == "extra_forbidden":
            yield _unknown_key(model, error["loc"], path)
        elif error["type"] == "missing" and isinstance(error["loc"][-1], int):
            by_path.setdefault(_shown(path, value), []).append(
                f"value {error['loc'][-1] + 1} is missing"
            )
        elif error["type"] == "missing":
            yield f"{path}: is missing"
        elif error["type"] == "union_tag_invalid":
            yield _unknown_kind(path, error["ctx"])
        elif "error" in error.get("ctx", {}):
            yield f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
        else:
            by_path.setdefault(_shown(path, value), []).append(_reason(error))
    for where, reasons in by_path.items():
        yield f"{where}: {', or '.join(dict.fromkeys(reasons))}"


def _reason(error: ErrorDetails) -> str:
    """What the value must be; of a size, in words rather than as a pattern."""
    pattern = str(error.get("ctx", {}).get("pattern"))
    return _PATTERNS.get(pattern, _lower_first(error["msg"]))


def _shown(path: str, value: object) -> str:
    """The key with its value; a long value is cut."""
    if isinstance(value, dict):
        return path
    text = json.dumps(value, default=str)
    short = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{path} = {short}"


def _locate(
    settings: dict[str, Any], location: tuple[int | str, ...], *, missing: bool
) -> tuple[str, object]:
    """The key as it stands in the file, and its value.

    pydantic's location also names members of unions, which are no keys and are left out.
    """
    path = ""
    value: Any = settings
    for part in location:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (missing and part is location[-1])):
            path, value = f"{path}.{part}" if path else str(part), value.get(str(part))
    return path, value


def _unknown_key(model: type[Section], location: tuple[int | str, ...], path: str) -> str:
    known = _known_keys(model, location[:-1])
    nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.65)
    section = path.rpartition(".")[0]
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"
    return (
        f"{path}: unknown key in [{section}]; {remedy}"
        if section
        else f"[{path}]: unknown section; {remedy}"
    )


def _unknown_kind(path: str, context: dict[str, Any]) -> str:
    """The message for a `kind` that no member of a union has."""
    # pydantic lists the known ones as one text: "'hash', 'dictionary'"
    kind, known = context["tag"], context["expected_tags"]
    nearest = difflib.get_close_matches(kind, re.findall(r"'(\w+)'", known), n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"there are {known}"
    return f'{path}.kind = "{kind}": unknown; {remedy}'


def _known_keys(model: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at pydantic's location.

    Each part of a location is a key, an index into a list, or the `kind` of a union's member.
    """
    sections = [model]
    for part in location:
        keyed = [section for section in sections if part in section.model_fields]
        tagged = [
            section
            for section in sections
            if "kind" in section.model_fields and part in _kinds(section)
        ]
        if keyed:
            sections = [
                inner
                for section in keyed
                for inner in _sections_in(section.model_fields[str(part)].annotation)
            ]
        elif tagged:
            sections = tagged
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _kinds(section: type[Section]) -> tuple[object, ...]:
    return get_args(section.model_fields["kind"].annotation)


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
