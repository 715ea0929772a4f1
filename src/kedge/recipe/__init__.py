"""The recipe: everything a run is told, typed, validated and frozen.

A recipe is a TOML file; `--set section.key=value` overrides it. All problems are reported at once, each with its file
and line or flag, the key, the value, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kedge.errors import InputError, Problem
from kedge.recipe.consistency import inconsistent
from kedge.recipe.sections import Data, Desk, Recipe, Section

__all__ = ["Data", "Desk", "Key", "Recipe", "Section", "build", "keys", "load", "missing_files", "parse"]

# Keys that hold the path of a model folder, or a word.
FOLDERS = {"model.init": "scratch", "reward.init": "sft", "policy.reference": "sft"}


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its dotted name, what it may be, its default and what it means."""

    name: str
    kind: type
    allowed: str
    default: Any
    meaning: str


@cache
def keys() -> Mapping[str, Key]:
    """Every key of a recipe by dotted name, in the order of the sections; NAME stands for a name the user chooses."""
    return {key.name: key for key in _keys(Recipe, "")}


def _key(name: str) -> Key | None:
    return keys().get(_general(name))


def _general(name: str) -> str:
    """The dotted name with NAME for what the user chose: rewards.polite.weight is rewards.NAME.weight."""
    return re.sub(r"^rewards\.[^.]+", "rewards.NAME", name)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file at `path` with `key=value` overrides.

    Relative paths in the file start at its folder, those in overrides at the working directory.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(Problem(str(path), "there is no such recipe", "give the path of a TOML file")) from None
    except UnicodeDecodeError:
        raise InputError(Problem(str(path), "is not UTF-8 text", "give the path of a TOML file")) from None
    return parse(text, overrides, source=str(path), folder=path.parent)


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "recipe", folder: Path | None = None) -> Recipe:
    """The recipe in TOML `text`; `source` names it in errors, relative paths in it start at `folder`."""
    try:
        given = tomllib.loads(text)
    except ValueError as error:
        line = re.search(r"\(at line (\d+)", str(error))
        where = f"{source}:{line[1]}" if line else source
        remedy = 'a recipe has [sections] and lines such as name = "text" or steps = 36'
        raise InputError(Problem(where, f"not readable as TOML: {error}", remedy)) from None
    return _build(given, overrides, source, lines=_lines(text), folder=folder)


def build(given: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """A recipe from nested settings and `key=value` overrides; every problem found is raised in one `InputError`."""
    return _build(given, overrides, source, lines={}, folder=None)


def missing_files(recipe: Recipe, source: str = "recipe") -> list[Problem]:
    """What the recipe names that is not on disk."""
    paths = {f"data.{name}": path for name, path in recipe.data if isinstance(path, Path)}
    for key, word in FOLDERS.items():
        section, name = key.split(".")
        if (given := getattr(getattr(recipe, section), name)) != word:
            paths[key] = Path(given)
    for name, rule in recipe.rewards.items():
        file = rule.function.rpartition(":")[0]
        if file.endswith(".py"):
            paths[f"rewards.{name}.function"] = Path(file)
    remedy = "correct the path; it starts at the recipe's folder, or with --set where you are"
    return [
        Problem(f"{source}: {key}", f"there is no {str(path)!r}", remedy)
        for key, path in paths.items()
        if not path.exists()
    ]


def _build(
    given: Mapping[str, Any], overrides: Sequence[str], source: str, *, lines: Mapping[str, int], folder: Path | None
) -> Recipe:
    settings = dict(given) if folder is None else _anchored(given, folder)
    flags: dict[str, str] = {}
    problems: list[Problem] = []
    for override in overrides:
        key, value = _parsed(override)
        if isinstance(value, Problem):
            problems.append(value)
        else:
            settings = _with(settings, key.split("."), value)
            flags[key] = f"--set {_cut(override)}"

    def place(key: str) -> str:
        """Where the user wrote `key`, or the table that holds it."""
        if key in flags:
            return flags[key]
        parts = key.split(".")
        line = next((lines[held] for end in range(len(parts), 0, -1) if (held := ".".join(parts[:end])) in lines), None)
        return f"{source}: {key}" if line is None else f"{source}:{line}: {key}"

    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems += [_explain(detail, place) for detail in error.errors()]
    else:
        problems += [Problem(place(key), what, remedy) for key, what, remedy in inconsistent(recipe)]
    if problems:
        raise InputError(problems)
    return recipe


def _parsed(override: str) -> tuple[str, Any]:
    """The key and value of `key=value`, or the key and a `Problem`."""
    name, equals, raw = override.partition("=")
    name, where = name.strip(), f"--set {_cut(override)}"
    if not equals:
        return name, Problem(where, "has no '='", "write --set section.key=value")
    key = _key(name)
    if key is not None:
        return name, _literal(raw.strip(), key.kind)
    parts = name.split(".")
    if not all(parts):
        return name, Problem(where, "names no key", "write --set section.key=value")
    for end in range(len(parts) - 1, 0, -1):
        if _key(".".join(parts[:end])):
            whole = ".".join(parts[:end])
            return name, Problem(where, f"{whole} is a value, not a section", f"write --set {whole}=value")
    if _names_under(name):
        return name, Problem(where, f"{name} is a section", f"set one of its keys: {', '.join(_names_under(name))}")
    return name, _unknown(where, name)


def _literal(raw: str, kind: type) -> Any:
    """What the text after '=' means for a key of type `kind`; what does not fit stays text and is refused later."""
    if kind is Path:
        return Path(raw).expanduser().absolute() if raw else raw
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except ValueError:
        value = raw
    if kind is str:
        return value if isinstance(value, str) else raw
    if kind is float and isinstance(value, str):
        try:
            return float(value)  # .5 and 1. are numbers to people, though not to TOML
        except ValueError:
            return value
    return value


def _with(settings: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested `settings` in which `path` leads to `value`; what is not a table is left to be refused."""
    head, *rest = path
    if not rest:
        return {**settings, head: value}
    inner = settings.get(head, {})
    return {**settings, head: _with(inner, rest, value)} if isinstance(inner, dict) else settings


def _anchored(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Nested settings in which relative paths start at `folder`."""
    settings = dict(given)
    for key in keys().values():
        section, _, name = key.name.rpartition(".")
        table = settings.get(section)
        if not isinstance(table, dict) or not isinstance(text := table.get(name), str) or not text:
            continue
        if key.kind is Path or (key.name in FOLDERS and text != FOLDERS[key.name]):
            settings[section] = {**table, name: str((folder / Path(text).expanduser()).absolute())}
    rules = settings.get("rewards")
    return {**settings, "rewards": _anchored_rules(rules, folder)} if isinstance(rules, dict) else settings


def _anchored_rules(rules: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Rewards whose functions are in files found from `folder`."""
    anchored = dict(rules)
    for name, rule in rules.items():
        function = rule.get("function") if isinstance(rule, dict) else None
        if isinstance(function, str) and ".py:" in function:
            anchored[name] = {**rule, "function": str((folder / Path(function).expanduser()).absolute())}
    return anchored


def _lines(text: str) -> dict[str, int]:
    """The line on which each table and key of a TOML text is written, as far as a line tells by itself."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if table := re.match(r"\s*\[\s*([\w.\- ]+?)\s*\]", line):
            section = table[1].replace(" ", "") + "."
            found.setdefault(section[:-1], number)
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            found.setdefault(section + key[1], number)
    return found


def _explain(detail: Any, place: Callable[[str], str]) -> Problem:
    name = ".".join(part for part in detail["loc"] if isinstance(part, str))  # a number is a place in a list
    where = place(name)
    if detail["type"] == "extra_forbidden":
        return _unknown(where, name)
    key, given = _key(name), _shown(detail["input"])
    if detail["type"] == "missing" and key is not None and isinstance(detail["loc"][-1], str):
        return Problem(where, "is missing", f"write {name} = {key.allowed}")
    if detail["loc"][-1] == "[key]":
        return Problem(
            place(name.removesuffix(".[key]")), f"{given} is no name", "use a-z, 0-9 and _, from a letter on"
        )
    if key is None:
        return Problem(where, f"{given} is not a section", f"write [{name}] and its keys below it")
    default = "it may be left out" if key.default is None else f"the default is {_shown(key.default)}"
    return Problem(where, f"{given} is not allowed: expected {key.allowed}", default)


def _unknown(where: str, name: str) -> Problem:
    """No such key: the nearest one in the same section, else one of that name elsewhere, else all that there are."""
    section, _, last = name.rpartition(".")
    known = _names_under(section)
    if not known:
        return _unknown(where, section)
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == last]
    close = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
    near = [f"{section}.{close[0]}" if section else close[0]] if close else elsewhere[:3]
    near = near or difflib.get_close_matches(name, [*keys(), *known], n=1, cutoff=0.7)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}"
    return Problem(where, f"there is no key {name}", remedy)


def _names_under(section: str) -> list[str]:
    """The keys and sections directly inside `section` ('' is the whole recipe); none if there is no such section."""
    start = f"{_general(section)}." if section else ""
    return list(dict.fromkeys(key.removeprefix(start).split(".")[0] for key in keys() if key.startswith(start)))


def _keys(section: type[BaseModel], start: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{start}{name}.")
        elif get_origin(kind) is dict:
            yield from _keys(get_args(kind)[1], f"{start}{name}.NAME.")
        else:
            plain, choices, rules = _value(kind)
            allowed = " or ".join(f'"{choice}"' for choice in choices) or _allowed(plain, [*rules, *field.metadata])
            default = None if field.is_required() else field.default
            default = list(default) if isinstance(default, tuple) else default  # as one writes it
            yield Key(start + name, plain, allowed, default, field.description or "")


def _value(kind: Any) -> tuple[type, tuple[str, ...], list[Any]]:
    """The type of a key's value, the choices and the constraints, of an annotation that may be optional."""
    if get_origin(kind) is Literal:
        return str, get_args(kind), []
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        plain, choices, rules = _value(inner)
        return plain, choices, [*rules, *(rule for one in metadata for rule in getattr(one, "metadata", [one]))]
    if get_origin(kind) is tuple:
        return tuple, (), _value(get_args(kind)[0])[2]
    if get_origin(kind) in (Union, UnionType):
        return _value(next(part for part in get_args(kind) if part is not type(None)))
    return kind, (), []


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a list of three numbers",
}


def _allowed(kind: type, metadata: Sequence[Any]) -> str:
    """What a value may be, in words, from its type and its constraints."""
    words = _WORDS[kind]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {bound}"
        for rule in metadata
        for name, sign in signs.items()
        if (bound := getattr(rule, name, None)) is not None
    ]
    if kind is tuple and not bounds:
        return "a list of texts"
    if any(getattr(rule, "pattern", None) for rule in metadata):
        words += " of letters, digits, '.', '_' and '-', beginning with a letter or digit"
    return f"{words} {' and '.join(bounds)}".strip()


def _shown(value: Any) -> str:
    """A value as the user would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return _cut(f'"{value}"' if isinstance(value, str) else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
