"""A page of YAML as plain data, and where each key of it stands: file, line and column for every complaint."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.constructor import SafeConstructor

from persea.errors import RecipeError

ALLOWED_ENV_VARS = ("PERSEA_DATA", "HF_HOME")
DEFAULT_DATA_FOLDER = (
    Path(__file__).resolve().parents[3] / "shared" / "data"
)  # PERSEA_DATA where it is not set: beside the checkout
SECRET_PREFIXES = ("sk-", "hf_")  # how API keys begin; one is never shown
URL_WITH_CREDENTIALS = re.compile(r"https?://(?:[^/\s]*@|\S*\?)")
MAX_ALIASES, MAX_DEPTH, MAX_VALUES = (
    100,
    16,
    10_000,
)  # a recipe is a page; a few aliases of aliases can stand for billions of values
KeyPath: TypeAlias = tuple[str | int, ...]


class Yaml12Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 reads them: `no` is Norwegian, 3e-3 is a number; 010, 1:30 and dates are text until a field wants more."""

    yaml_implicit_resolvers = {}


class Yaml12Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or `Loader` would take for something else than text."""


_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)\Z"), None
)
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)\Z"), None
)
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]{0,17})\Z"), None
)
Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)
Yaml12Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


@dataclass
class YamlSource:
    """A recipe being read. places: where each key stands, in order; problems: the first of each key."""

    file: Path
    locations: dict[KeyPath, str]
    data: Any = None
    problems: dict[KeyPath, RecipeError] = field(default_factory=dict)
    num_values: int = 0

    def nearest_key(self, path: KeyPath) -> KeyPath:
        """The key, or the innermost section around it that stands somewhere."""
        return next(path[:k] for k in range(len(path), -1, -1) if path[:k] in self.locations)

    def add_problem(self, path: KeyPath, what: str, remedy: str) -> None:
        dotted = ".".join(k if isinstance(k, str) and k.isprintable() else repr(k) for k in path)
        where = self.locations[self.nearest_key(path)]
        self.problems.setdefault(
            path, RecipeError(f"{dotted}: {what}" if path else what, where=where, remedy=remedy)
        )


def read_yaml(path: Path) -> YamlSource:
    """Read a YAML file. Raises RecipeError where it is no page of keys and values; repeated keys are noted as problems."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1
        )
        remedy = (
            f"did you mean {path.parent / near[0]}?" if near else "give the path of a .yaml file"
        )
        raise RecipeError(
            f"cannot read the recipe: {error.strerror}", where=str(path), remedy=remedy
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"byte {error.start} is not UTF-8", where=str(path), remedy="save the file as UTF-8"
        ) from error
    node = _parse_yaml(text, str(path))
    if not isinstance(node, yaml.MappingNode):
        what = (
            "the recipe is empty"
            if node is None
            else "the recipe does not consist of `key: value` lines"
        )
        raise RecipeError(what, where=f"{path}:1:1", remedy="start from recipes/quickstart.yaml")
    reading = YamlSource(path, {(): f"{path}:1:1"})
    reading.data = _to_plain_data(node, (), reading, str(path))
    return reading


def _parse_yaml(text: str, origin: str) -> yaml.Node | None:
    """The node tree of one YAML document. Its events are looked at first: they are flat, whatever the document nests."""
    depth = aliases = 0
    try:
        for event in yaml.parse(text, Yaml12Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            aliases += isinstance(event, yaml.AliasEvent)
            tag = str(getattr(event, "tag", None) or "").replace("tag:yaml.org,2002:", "!!")
            what = (
                f"the tag {tag} is refused"
                if tag
                else f"more than {MAX_ALIASES} aliases"
                if aliases > MAX_ALIASES
                else f"nested more than {MAX_DEPTH} deep"
                if depth > MAX_DEPTH
                else "half a character"
                if re.search("[\ud800-\udfff]", getattr(event, "value", ""))
                else ""
            )
            if what:
                raise RecipeError(
                    what,
                    where=_format_location(origin, event.start_mark),
                    remedy="write the plain values; a recipe holds nothing else",
                )
        return yaml.compose(text, Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        remedy = "indent with spaces; quote a value that begins with a sign or holds `: `, ` #`, `{` or `[`"
        raise RecipeError(
            f"not YAML: {error.problem}",
            where=_format_location(origin, error.problem_mark),
            remedy=remedy,
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        mark = yaml.Mark(
            "", 0, line, error.position - text.rfind("\n", 0, error.position) - 1, None, 0
        )
        raise RecipeError(
            "not YAML: a control character",
            where=_format_location(origin, mark),
            remedy="delete it",
        ) from error


def _format_location(origin: str, mark: Any) -> str:
    """The place of a mark in a file; an override is its own place."""
    return (
        origin
        if origin.startswith("--set ") or mark is None
        else f"{origin}:{mark.line + 1}:{mark.column + 1}"
    )


def _to_plain_data(node: yaml.Node, path: KeyPath, yaml_source: YamlSource, origin: str) -> Any:
    """Node -> dict, list or scalar; on the way the keys' places are noted and keys written twice are refused."""
    yaml_source.num_values += 1
    if yaml_source.num_values > MAX_VALUES or len(path) > MAX_DEPTH:
        raise RecipeError(
            "the aliases here multiply without end",
            where=_format_location(origin, node.start_mark),
            remedy="write the values out",
        )
    if isinstance(node, yaml.ScalarNode):
        return SafeConstructor().construct_object(node)  # type: ignore[no-untyped-call]
    if isinstance(node, yaml.SequenceNode):
        items = []
        for k, item in enumerate(node.value):
            yaml_source.locations[*path, k] = _format_location(origin, item.start_mark)
            items.append(_to_plain_data(item, (*path, k), yaml_source, origin))
        return items
    data: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        key, place = key_node.value, _format_location(origin, key_node.start_mark)
        if key_node.tag != "tag:yaml.org,2002:str":
            raise RecipeError(
                "this key is not a word",
                where=place,
                remedy="a key is a word; put a number or a truth value in quotes",
            )
        yaml_source.locations[*path, key] = place
        first = lines.setdefault(key, key_node.start_mark.line + 1)
        if key in data:
            yaml_source.add_problem(
                (*path, key),
                f"written twice, on lines {first} and {key_node.start_mark.line + 1}",
                "keep one",
            )
        data[key] = _to_plain_data(value, (*path, key), yaml_source, origin)
    return data


def apply_override(yaml_source: YamlSource, assignment: str) -> None:
    """Lay `training.steps=20` over the data; its place is the override itself, which never shows a secret."""
    dotted, equals, text = assignment.partition("=")
    hidden = any(s in text for s in SECRET_PREFIXES)
    origin = (
        f"--set {dotted}=..."
        if hidden
        else f"--set {assignment if assignment.isprintable() else repr(assignment)}"
    )
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            "not `key=value`", where=origin, remedy="for example --set training.steps=20"
        )
    node, at = _parse_yaml(text, origin), yaml_source.data
    path: KeyPath = ()
    for depth, name in enumerate(keys, start=1):
        above = ".".join(keys[: depth - 1])
        if not isinstance(at, dict | list):
            raise RecipeError(
                f"{above} is a plain value",
                where=origin,
                remedy=f"leave out `.{'.'.join(keys[depth - 1 :])}`",
            )
        if isinstance(at, list) and not (name.isdecimal() and int(name) < len(at)):
            raise RecipeError(
                f"{above} has no entry {name!r}",
                where=origin,
                remedy=f"it has {len(at)}; count from 0",
            )
        key: Any = int(name) if isinstance(at, list) else name
        path = (*path, key)
        if depth == len(keys):
            yaml_source.locations = {
                p: place for p, place in yaml_source.locations.items() if p[:depth] != path
            } | {path: origin}
            at[key] = None if node is None else _to_plain_data(node, path, yaml_source, origin)
        elif isinstance(at, dict) and at.get(name) is None:
            at[key], yaml_source.locations[path] = {}, origin
        at = at[key]


def resolve_values(value: Any, path: KeyPath, yaml_source: YamlSource) -> Any:
    """Variables filled in and paths absolute; values that no field may hold are refused."""
    if isinstance(value, dict):
        return {k: resolve_values(v, (*path, k), yaml_source) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve_values(v, (*path, k), yaml_source) for k, v in enumerate(value)]
    if value is None:
        yaml_source.add_problem(path, "has no value", "give one, or delete the line")
    if not isinstance(value, str):
        return value
    if is_secret(value):
        yaml_source.add_problem(
            path, "looks like a secret", "name an environment variable instead; a recipe is shared"
        )
    text = re.sub(r"\$\{([^}]*)\}?", lambda m: _env_value(m[1], path, yaml_source), value)
    folder, is_text = (
        yaml_source.file.absolute().parent,
        path[:2] in (("check", "texts"), ("evaluation", "lm_eval")),
    )
    is_set = path[:2] == ("evaluation", "sets") and path[-1] in ("file", "answers")
    is_place = (
        is_text
        or is_set
        or (
            path[0] in ("student", "teachers", "corpus")
            and path[-1] in ("model", "tokenizer", "file")
        )
    )
    # os.path.exists, because Path.exists raises where a name is too long
    local = (
        is_text
        or text.startswith((".", "/", "~"))
        or path[-1] == "file"
        or is_set
        or os.path.exists(folder / text)
    )
    if not is_place or (text in ("", "random", "words") and not is_text) or not local:
        return text
    return os.path.abspath(
        folder / os.path.expanduser(text)
    )  # Path.resolve would follow a link and so rename the teacher


def _env_value(name: str, path: KeyPath, yaml_source: YamlSource) -> str:
    remedy = f"allowed: {', '.join(f'${{{v}}}' for v in ALLOWED_ENV_VARS)}"
    value = os.environ.get(name) or (str(DEFAULT_DATA_FOLDER) if name == "PERSEA_DATA" else "")
    if name not in ALLOWED_ENV_VARS:
        yaml_source.add_problem(path, f"the variable {name!r} may not be read here", remedy)
    elif not value:
        yaml_source.add_problem(
            path, f"the variable {name!r} is not set", f"export {name}=/some/folder; {remedy}"
        )
    return str(Path(value).expanduser().absolute())


def suggest_choice(word: str, choices: Sequence[str]) -> str:
    """What a person may have meant by a word that is none of the choices."""
    near = difflib.get_close_matches(word.lower(), choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(choices)}"


def is_secret(value: Any) -> bool:
    """Whether a value looks like an API key, or like an address that holds one: https://user:key@host, https://host?key=..."""
    return isinstance(value, str) and (
        value.strip(" '\"").startswith(SECRET_PREFIXES)
        or URL_WITH_CREDENTIALS.match(value.strip(" '\"")) is not None
    )
