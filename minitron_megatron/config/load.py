"""YAML file + `key=value` overrides → Recipe; every problem is reported at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads and validates a recipe; raises RecipeError with one line per problem."""
    source = Path(path)
    values = _read(source, overrides or [])
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError([f"{source}: {_problem(item)}" for item in error.errors()]) from None


def _read(source: Path, overrides: list[str]) -> dict[str, Any]:
    if not source.is_file():
        raise RecipeError(f"{source}: no such recipe; `ls configs/*.yaml` shows those that come with the project")
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise RecipeError([f"override '{item}' is not of the form key=value, for example distill.steps=200" for item in malformed])
    try:
        loaded = OmegaConf.load(source)
        if not isinstance(loaded, DictConfig):
            raise RecipeError(f"{source}: a recipe is a mapping of sections, found a list")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides))
        _replace_mappings(merged, overrides)
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise RecipeError(f"{source}: no valid YAML or override: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of sections, found {type(values).__name__}")
    return values


def _replace_mappings(merged: Any, overrides: list[str]) -> None:
    """`distill.loss=…` replaces the mapping of weights as a whole instead of merging into it."""
    for item in overrides:
        key, value = item.split("=", 1)
        if key == "distill.loss" and isinstance(merged, DictConfig):
            OmegaConf.update(merged, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=False)


def _problem(item: Any) -> str:
    where = [part for part in item["loc"] if not str(part).startswith("[")]  # tags, not keys
    key = ".".join(str(part) for part in where)
    if item["type"] == "extra_forbidden":
        return _unknown_key(where)
    if item["type"] == "missing":
        return f"{key} is missing; {_description(where)}"
    found = f" (found {item['input']!r})" if not isinstance(item["input"], dict) else ""
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}{found}"


def _unknown_key(where: list[Any]) -> str:
    parent, name = where[:-1], str(where[-1])
    known = _fields_at(parent)
    close = difflib.get_close_matches(name, known, n=1)
    mend = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
    section = f"{'.'.join(map(str, parent))}." if parent else ""
    return f"{section}{name}: unknown {'key' if parent else 'section'} '{name}'; {mend}"


def _fields_at(where: list[Any]) -> list[str]:
    section = _section_at(where)
    return sorted(section.model_fields) if section else []


def _section_at(where: list[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] = Recipe
    for part in where:
        if isinstance(part, int):  # of a list
            continue
        field = section.model_fields.get(str(part))
        inner = _sections_in(field.annotation) if field else []
        if not inner:
            return None
        section = inner[0]
    return section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, out of unions and annotations."""
    if _is_section(annotation):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _description(where: list[Any]) -> str:
    section = _section_at(where[:-1])
    field = section.model_fields.get(str(where[-1])) if section else None
    return field.description if field and field.description else "it has no default"
