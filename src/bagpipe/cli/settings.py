"""`bagpipe settings` lists every key of a run's file, from the sections' own JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bagpipe.cli.common import mistakes_told

Schema: TypeAlias = dict[str, Any]
_FAR = 10**6


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One form of one section: those with a `kind` have several."""

    path: str  # as TOML has it, e.g. "train.lr_schedule"
    kind: str | None
    schema: Schema

    @property
    def title(self) -> str:
        """As the file spells it."""
        return f"[{self.path}]" if self.kind is None else f'[{self.path}] kind = "{self.kind}"'


def settings(
    section: Annotated[
        str | None,
        typer.Argument(help="Only this section and those within it, e.g. train or cache."),
    ] = None,
) -> None:
    """List the settings of a run's file: type, limits, default and meaning of each key."""
    with mistakes_told():
        from bagpipe.config.run import RunConfig

        root = RunConfig.model_json_schema()
        variants = list(_variants("", root, root))
        told = [one for one in variants if section is None or _is_within(one.path, section)]
        if not told:
            known = ", ".join(dict.fromkeys(one.path for one in variants))
            raise typer.BadParameter(f"there is no section {section!r}: there are {known}")
    console = Console()
    for one in told:
        console.print(f"[bold]{escape(one.title)}[/bold]  {escape(_meaning(one.schema))}")
        console.print(_as_table(one, root))


def _is_within(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def _variants(path: str, schema: Schema, root: Schema) -> Iterator[Variant]:
    """The sections in a section, each before those within it."""
    for key, value in schema.get("properties", {}).items():
        for found in _sections(value, root):
            inner = f"{path}.{key}" if path else key
            yield Variant(path=inner, kind=_kind(found), schema=found)
            yield from _variants(inner, found, root)


def _sections(value: Schema, root: Schema) -> list[Schema]:
    """The sections that a value may be; none if it is a number, a text or the like."""
    if "$ref" in value:
        found: Schema = root["$defs"][value["$ref"].rpartition("/")[2]]
        return [found] if found.get("type") == "object" else _sections(found, root)
    parts = [*value.get("oneOf", ()), *value.get("anyOf", ()), *value.get("allOf", ())]
    if "items" in value:
        parts.append(value["items"])
    return [section for part in parts for section in _sections(part, root)]


def _kind(section: Schema) -> str | None:
    kind: Schema = section.get("properties", {}).get("kind", {})
    name: str | None = kind.get("const", "package.module:Class" if "pattern" in kind else None)
    return name


def _as_table(variant: Variant, root: Schema) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("key", "value", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    required = variant.schema.get("required", ())
    for key, value in variant.schema.get("properties", {}).items():
        if key == "kind" and "const" in value:
            continue  # the title tells it
        default = "required" if key in required else _default(value)
        cells = (key, _type(value, root), default, _meaning(value))
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _meaning(schema: Schema) -> str:
    """The docstring in one line."""
    return " ".join(schema.get("description", "").replace("`", "").split())


def _default(value: Schema) -> str:
    """The default as TOML spells it; empty where the meaning says what no value does."""
    default = value.get("default")
    if default is None:
        return ""
    if isinstance(default, dict):  # a section's own table tells its defaults
        return str(default.get("kind", ""))
    return json.dumps(default)


def _type(value: Schema, root: Schema) -> str:
    """What may be given, in words."""
    if _sections(value, root):
        return "list of sections" if value.get("type") == "array" else "section"
    if "anyOf" in value:
        parts = [_type(part, root) for part in value["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "const" in value or "enum" in value:
        return " or ".join(json.dumps(one) for one in value.get("enum", [value.get("const")]))
    kind = value.get("type", "any")
    if kind == "array":
        items = value.get("prefixItems") or [value.get("items", {})]
        return "list of " + " and ".join(dict.fromkeys(_type(item, root) for item in items))
    if kind in ("integer", "number"):
        return f"{kind}{_limits(value)}"
    if kind == "object":
        return "table"
    return "path" if value.get("format") == "path" else str(kind)


def _limits(value: Schema) -> str:
    """The limits that a user may meet. Others only catch a digit too many."""
    low, above = value.get("minimum"), value.get("exclusiveMinimum")
    high, below = value.get("maximum"), value.get("exclusiveMaximum")
    limits = "" if low is None else f" from {low:,}"
    limits = limits if above is None else f" above {above:,}"
    if high is not None and high < _FAR:
        limits += f" to {high:,}"
    if below is not None and below < _FAR:
        limits += f" below {below:,}"
    return limits
