"""YAML file + `key=value` overrides → Recipe; every problem is reported at once. `config/family.py` is what the commands call."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError

Kind = TypeVar("Kind", bound=BaseModel)


def validated(source: str | Path, values: dict[str, Any]) -> Recipe:
    """A recipe out of plain values; raises RecipeError with one line per problem."""
    return validated_as(Recipe, source, values)


def validated_as(kind: type[Kind], source: str | Path, values: dict[str, Any]) -> Kind:
    """A file of another kind than a recipe, an ablation say."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError([f"{source}: {_problem(item, kind)}" for item in error.errors()]) from None


def recipe_file(path: str | Path) -> DictConfig:
    """A YAML file that is a mapping; raises RecipeError for anything else."""
    source = Path(path)
    if not source.is_file():
        raise RecipeError(f"{source}: no such recipe; `ls configs/*.yaml` shows those that come with the project")
    with told_as_one_line(source):
        loaded = OmegaConf.load(source)
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{source}: a recipe is a mapping of sections, found a list")
    return loaded


def merged(source: str | Path, loaded: Any, overrides: list[str]) -> dict[str, Any]:
    """The file's values with `key=value` in their place; raises RecipeError for overrides that are none."""
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise RecipeError([f"override '{item}' is not of the form key=value, for example distill.steps=200" for item in malformed])
    with told_as_one_line(source):
        together = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides))
        _replace_mappings(together, overrides)
        values: Any = OmegaConf.to_container(together, resolve=True)
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of sections, found {type(values).__name__}")
    return values


@contextmanager
def told_as_one_line(source: str | Path) -> Iterator[None]:
    """What YAML and omegaconf raise, interpolations of keys that are not there among it, as a RecipeError."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise RecipeError(f"{source}: no valid YAML or override: {' '.join(str(error).split())}") from None


def _replace_mappings(together: Any, overrides: list[str]) -> None:
    """`distill.loss=…` replaces the mapping of weights as a whole instead of merging into it."""
    for item in overrides:
        key, value = item.split("=", 1)
        if key == "distill.loss" and isinstance(together, DictConfig):
            OmegaConf.update(together, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=False)


def _problem(item: Any, kind: type[BaseModel]) -> str:
    where = [part for part in item["loc"] if not str(part).startswith("[")]  # tags, not keys
    key = ".".join(str(part) for part in where)
    if item["type"] == "extra_forbidden":
        return _unknown_key(where, kind)
    if item["type"] == "missing":
        return f"{key} is missing; {_description(where, kind)}"
    if item["type"] in ("model_type", "model_attributes_type") and (known := _fields_at(where, kind)):
        return f"{key} is a section, not {item['input']!r}; its keys: {', '.join(known)}"
    found = f" (found {item['input']!r})" if not isinstance(item["input"], dict) else ""
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}{found}"


def _unknown_key(where: list[Any], kind: type[BaseModel]) -> str:
    parent, name = where[:-1], str(where[-1])
    known = _fields_at(parent, kind)
    close = difflib.get_close_matches(name, known, n=1)
    mend = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
    section = f"{'.'.join(map(str, parent))}." if parent else ""
    return f"{section}{name}: unknown {'key' if parent or kind is not Recipe else 'section'} '{name}'; {mend}"


def _fields_at(where: list[Any], kind: type[BaseModel]) -> list[str]:
    section = _section_at(where, kind)
    return sorted(field.alias or name for name, field in section.model_fields.items()) if section else []


def _section_at(where: list[Any], kind: type[BaseModel]) -> type[BaseModel] | None:
    section = kind
    parts = iter(where)
    for part in parts:
        if isinstance(part, int):  # of a list
            continue
        field = section.model_fields.get(str(part))
        inner = sections_in(field.annotation) if field else []
        if not inner:
            return None
        section = inner[0]
        if field and get_origin(field.annotation) is dict:
            next(parts, None)  # a key of the mapping
    return section


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, out of unions and annotations."""
    if _is_section(annotation):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _description(where: list[Any], kind: type[BaseModel]) -> str:
    section = _section_at(where[:-1], kind)
    fields = {item.alias or name: item for name, item in section.model_fields.items()} if section else {}
    field = fields.get(str(where[-1]))
    return field.description if field and field.description else "it has no default"
