"""`minitron settings`: what a recipe may say, read from the sections' own fields."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.table import Table

from minitron_megatron.config.load import sections_in
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError


class Setting(NamedTuple):
    """One line of a recipe."""

    key: str
    values: str
    default: str
    meaning: str


def settings_of(section: str = "") -> list[Setting]:
    """Of one section of a recipe, its own sections included; of the top level, which names the sections, where none is named."""
    if not section:
        return [_setting(name, field) for name, field in Recipe.model_fields.items()]
    field = Recipe.model_fields.get(section)
    kinds = sections_in(field.annotation) if field else []
    if not kinds:
        known = [name for name, field in Recipe.model_fields.items() if sections_in(field.annotation)]
        raise RecipeError(f"settings: a recipe has no section '{section}'; its sections: {', '.join(known)}")
    return list(_below(kinds[0], f"{section}.", (kinds[0],)))


def settings_table(section: str = "") -> Table:
    table = Table(title=f"Section {section}" if section else "A recipe; `minitron settings SECTION` lists a section", title_justify="left")
    for header in ("key", "values", "default", ""):
        table.add_column(header, overflow="fold")
    for setting in settings_of(section):
        table.add_row(*map(escape, setting))
    return table


def _below(kind: type[BaseModel], prefix: str, above: tuple[type[BaseModel], ...]) -> Iterator[Setting]:
    for name, field in kind.model_fields.items():
        key, inner = f"{prefix}{field.alias or name}", sections_in(field.annotation)
        yield _setting(key, field)
        for section in inner[:1]:
            if section not in above:
                yield from _below(section, f"{key}.{_entry(field.annotation)}", (*above, section))


def _setting(key: str, field: FieldInfo) -> Setting:
    meaning = field.description or _summary(sections_in(field.annotation))
    return Setting(key, _values(field.annotation), _default(field), meaning)


def _summary(sections: list[type[BaseModel]]) -> str:
    """The first sentence of a section's docstring."""
    said = " ".join((sections[0].__doc__ or "").split()) if sections else ""
    return said.split(". ")[0].rstrip(".")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return ""
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _values(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_values(kind) for kind in inner if kind is not NoneType))
    if hasattr(annotation, "__metadata__"):
        return _values(inner[0])
    if origin in (list, tuple):
        return f"list of {_values(inner[0])}" if inner else "list"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(getattr(annotation, "__name__", ""), str(annotation))


def _entry(annotation: Any) -> str:
    """What stands between the key of a list or a mapping and the keys of its sections."""
    origins = {get_origin(kind) for kind in (annotation, *get_args(annotation))}
    return "NAME." if dict in origins else "NUMBER." if origins & {list, tuple} else ""
