"""Read YAML into plain data and keep the file, line and column of every key for error messages.

The reader follows YAML 1.2 and refuses tags, repeated keys and alias bombs. Overrides
(`--set key=value`), environment variables and relative paths are resolved here too.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.constructor import SafeConstructor

from persea.config.bundled import BUNDLED_PREFIX, bundled_models, bundled_path
from persea.config.secrets import is_secret
from persea.errors import RecipeError
from persea.storage import read_input_bytes

ALLOWED_ENV_VARS = ("PERSEA_DATA", "HF_HOME")
# A recipe is about a page long. Without limits, a few aliases of aliases expand to billions of
# values ("alias bomb").
MAX_RECIPE_BYTES = 1_000_000
MAX_ALIASES, MAX_DEPTH, MAX_VALUES = 100, 16, 10_000
MODEL_KEYWORDS = ("", "random", "text_only")  # values of `model:` that are not paths
KeyPath: TypeAlias = tuple[str | int, ...]


class Yaml12Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2: `no` is text, 3e-3 a number; 010, 1:30 and dates text.

    A field of a section converts text to a date.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (pyyaml declares it on the instance)


class Yaml12Dumper(yaml.SafeDumper):
    """Dumper that quotes text which YAML 1.1 or `Yaml12Loader` would read as another type."""


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
    """The data of a YAML file with the location of each key and the problems found so far.

    Attributes:
        file: The file that was read.
        locations: `file:line:column` of each key, or the override that set it, in file order.
        data: Dicts, lists and scalars.
        problems: First problem of each key.
        num_values: Values read so far, aliases expanded.
        notices: One line for each old key that was given its new name.
    """

    file: Path
    locations: dict[KeyPath, str]
    data: Any = None
    problems: dict[KeyPath, RecipeError] = field(default_factory=dict)
    num_values: int = 0
    notices: list[str] = field(default_factory=list)

    def nearest_key(self, path: KeyPath) -> KeyPath:
        """Return the key, or the innermost section around it that has a location."""
        return next(path[:k] for k in range(len(path), -1, -1) if path[:k] in self.locations)

    def rename_path(self, old: KeyPath, new: KeyPath) -> None:
        """Move the locations and problems of a key, and of all keys inside it, to a new name."""
        n = len(old)

        def moved(path: KeyPath) -> KeyPath:
            return (*new, *path[n:]) if path[:n] == old else path

        self.locations = {moved(p): place for p, place in self.locations.items()}
        self.problems = {moved(p): problem for p, problem in self.problems.items()}

    def add_problem(self, path: KeyPath, message: str, remedy: str) -> None:
        """Note a problem of a key, unless the key has one already."""
        dotted = ".".join(k if isinstance(k, str) and k.isprintable() else repr(k) for k in path)
        where = self.locations[self.nearest_key(path)]
        self.problems.setdefault(
            path,
            RecipeError(f"{dotted}: {message}" if path else message, where=where, remedy=remedy),
        )


def read_yaml(path: Path) -> YamlSource:
    """Read a YAML file that consists of keys and values.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its data and locations. Repeated keys are noted as problems.

    Raises:
        RecipeError: The file cannot be read, or is not a YAML mapping.
    """
    try:
        text = read_input_bytes(path, MAX_RECIPE_BYTES).decode("utf-8-sig")
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
        message = (
            "the recipe is empty"
            if node is None
            else "the recipe does not consist of `key: value` lines"
        )
        raise RecipeError(message, where=f"{path}:1:1", remedy="start from recipes/quickstart.yaml")
    reading = YamlSource(path, {(): f"{path}:1:1"})
    reading.data = _to_plain_data(node, (), reading, str(path))
    return reading


def _parse_yaml(text: str, origin: str) -> yaml.Node | None:
    """Return the node tree of one YAML document.

    The flat event stream is checked first, so that deep nesting is refused before it is built.
    """
    depth = aliases = 0
    try:
        for event in yaml.parse(text, Yaml12Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            aliases += isinstance(event, yaml.AliasEvent)
            tag = str(getattr(event, "tag", None) or "").replace("tag:yaml.org,2002:", "!!")
            fault = (
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
            if fault:
                raise RecipeError(
                    fault,
                    where=_format_location(origin, event.start_mark),
                    remedy="write the plain values; a recipe holds nothing else",
                )
        return yaml.compose(text, Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        remedy = (
            "indent with spaces; quote a value that begins with a sign or holds `: `, ` #`, `{` "
            "or `[`"
        )
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
    """Return `file:line:column` of a mark; for an override, the override itself."""
    return (
        origin
        if origin.startswith("--set ") or mark is None
        else f"{origin}:{mark.line + 1}:{mark.column + 1}"
    )


def _to_plain_data(node: yaml.Node, path: KeyPath, yaml_source: YamlSource, origin: str) -> Any:
    """Convert a node to a dict, list or scalar; note locations and repeated keys on the way."""
    yaml_source.num_values += 1
    if yaml_source.num_values > MAX_VALUES or len(path) > MAX_DEPTH:
        raise RecipeError(
            "the aliases here expand to too many values",
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


def apply_override(
    yaml_source: YamlSource,
    assignment: str,
    rename: Callable[[YamlSource, list[str], str], list[str]] | None = None,
) -> None:
    """Set one key of the data, for example `training.steps=20`.

    Args:
        yaml_source: The data, changed in place. The key's location becomes the override.
        assignment: `dotted.key=value`, the value in YAML. Secrets are not shown in messages.
        rename: Maps the parts of the key to their new names (`rename_override`).

    Raises:
        RecipeError: Not `key=value`, a section that is a plain value, or a missing list entry.
    """
    dotted, equals, text = assignment.partition("=")
    hidden = is_secret(text, dotted.strip().rpartition(".")[2])
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
    keys = rename(yaml_source, keys, origin) if rename else keys
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
    """Return a copy of the data with variables filled in and paths absolute.

    Empty values and secrets are noted as problems.
    """
    if isinstance(value, dict):
        return {k: resolve_values(v, (*path, k), yaml_source) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve_values(v, (*path, k), yaml_source) for k, v in enumerate(value)]
    if value is None:
        yaml_source.add_problem(path, "has no value", "give one, or delete the line")
    if not isinstance(value, str):
        return value
    if is_secret(value, next((k for k in reversed(path) if isinstance(k, str)), "")):
        yaml_source.add_problem(
            path, "looks like a secret", "name an environment variable instead; a recipe is shared"
        )
    text = re.sub(r"\$\{([^}]*)\}?", lambda m: _env_value(m[1], path, yaml_source), value)
    if text.startswith(BUNDLED_PREFIX) and path[-1] in ("model", "tokenizer"):
        found = bundled_path(text)
        if not Path(found).is_dir():
            names = ", ".join(bundled_models())
            yaml_source.add_problem(path, f"names no bundled model ({text!r})", f"one of {names}")
        return found
    folder = yaml_source.file.absolute().parent
    if not _is_path(text, path, folder):
        return text
    # abspath, because Path.resolve follows links and so would rename a teacher
    return os.path.abspath(folder / os.path.expanduser(text))


PATH_KEYS = ("check.texts", "evaluation.lm_eval_results", "evaluation.lm_eval_include")


def _is_path(text: str, path: KeyPath, folder: Path) -> bool:
    """Return whether a value is a local path: always for files, by its form for models."""
    if ".".join(map(str, path[:2])) in PATH_KEYS:
        return bool(text)
    if path[:2] == ("evaluation", "benchmarks") and path[-1] in ("file", "answers"):
        return text not in MODEL_KEYWORDS
    if path == ("capture", "store"):
        return bool(text) and "://" not in text  # empty = the default; a URL of fsspec
    if path[:2] == ("evaluation", "texts") and path[-1] == "texts":
        return True
    if path[0] not in ("student", "teachers", "corpus", "tasks") or text in MODEL_KEYWORDS:
        return False
    if path[-1] in ("file", "texts", "chat_template"):
        return True
    # os.path.exists, because Path.exists raises where a name is too long
    return path[-1] in ("model", "tokenizer") and (
        text.startswith((".", "/", "~")) or os.path.exists(folder / text)
    )


def _env_value(name: str, path: KeyPath, yaml_source: YamlSource) -> str:
    remedy = f"allowed: {', '.join(f'${{{v}}}' for v in ALLOWED_ENV_VARS)}"
    value = os.environ.get(name, "")
    if name not in ALLOWED_ENV_VARS:
        yaml_source.add_problem(path, f"the variable {name!r} may not be read here", remedy)
    elif not value:
        yaml_source.add_problem(
            path, f"the variable {name!r} is not set", f"export {name}=/some/folder; {remedy}"
        )
    return str(Path(value).expanduser().absolute())


def suggest_choice(word: str, choices: Sequence[str]) -> str:
    """Return a remedy for a wrong word: the most similar choice, or all choices."""
    near = difflib.get_close_matches(word.lower(), choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(choices)}"
