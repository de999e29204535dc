"""Open a tokenizer of one raw file: tiktoken's (Kimi) or tekken.json (Mistral), without its code.

A tiktoken file has byte strings and ranks alone. The pattern that splits texts into words stands in
the Python file beside it; transformers takes Llama 3's pattern for every model, which cuts Chinese
text under Kimi's vocabulary otherwise than Kimi does. Here the pattern is read from that file's
syntax tree as constant text, never executed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from persea.errors import DataError

PATTERN_NAMES = ("pat_str", "PAT_STR", "pattern", "PATTERN")
# What tokenizers without a tokenizer.json consist of.
OTHER_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "tekken.json",
)
SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")


def find_tiktoken_file(folder: Path) -> Path | None:
    """Return the tiktoken file of a model folder that has no tokenizer.json; None for others."""
    if (folder / "tokenizer.json").is_file():
        return None
    found = sorted([*folder.glob("tiktoken.model"), *folder.glob("*.tiktoken")])
    return found[0] if found else None


def open_tokenizer_file(folder: Path, where: str) -> Any:
    """Return a transformers tokenizer of a folder that has only a tiktoken or tekken file.

    Returns:
        None for a folder with a tokenizer.json, or with neither.

    Raises:
        DataError: The file is damaged, or a package or the split pattern is missing.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    if (folder / "tekken.json").is_file():
        return open_tekken(folder / "tekken.json", where)
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    if is_sentencepiece and importlib.util.find_spec("sentencepiece") is None:
        raise DataError(
            "a tokenizer.model without tokenizer.json needs the package sentencepiece",
            where=where,
            remedy="pip install 'persea[sentencepiece]'",
        )
    file = find_tiktoken_file(folder)
    return None if file is None else open_tiktoken(file, where)


def open_tekken(file: Path, where: str) -> Any:
    """Return a transformers tokenizer of Mistral's tekken.json.

    AutoTokenizer would return mistral-common's own class, which has no tokenizer.json form.

    Raises:
        DataError: The file is damaged, or is a first tekken without its control tokens, which
            mistral-common has.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    try:
        tokenizer = MistralConverter(str(file)).converted()
    except ImportError as error:
        raise DataError(
            f"{file.name} lists no control tokens; they are in the package mistral-common",
            where=where,
            remedy="pip install mistral-common, or use a newer tekken.json",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file.name} is no tekken file: {error!r}", where=where, remedy="fetch it again"
        ) from error
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(file.parent, {}),
        **{k: t for k, t in special.items() if tokenizer.token_to_id(t) is not None},
    )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")


def open_tiktoken(file: Path, where: str) -> Any:
    """Return a transformers tokenizer of a tiktoken file and the files beside it.

    Control tokens come from `added_tokens_decoder` in tokenizer_config.json; ids between them are
    reserved tokens. The chat template is chat_template.jinja or the configuration's.

    Raises:
        DataError: The file is damaged, or no Python file beside it has the split pattern.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = _read_ranks(file, where)
    config_file = file.parent / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    added = {int(i): _content(t) for i, t in config.get("added_tokens_decoder", {}).items()}
    last = max(added, default=len(ranks) - 1)
    control = [added.get(i, f"<|reserved_token_{i}|>") for i in range(len(ranks), last + 1)]

    class Converter(TikTokenConverter):
        """transformers' converter, which would need the tiktoken package to read the file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    converter = Converter(  # type: ignore[no-untyped-call]
        vocab_file=str(file),
        pattern=find_split_pattern(file.parent, where),
        extra_special_tokens=control,
    )
    special = {k: _content(config[k]) for k in SPECIAL_TOKEN_KEYS if config.get(k)}
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        chat_template=_chat_template(file.parent, config),
        **special,
    )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _read_ranks(file: Path, where: str) -> dict[bytes, int]:
    """Read lines of base64 bytes and a rank."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(text, validate=True): int(rank) for text, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise DataError(
            f"{file.name} is no tiktoken file: {error}", where=where, remedy="fetch it again"
        ) from error
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise DataError(
            f"{file.name} is incomplete: its ranks are not 0 to {len(pairs) - 1}",
            where=where,
            remedy="fetch it again",
        )
    return ranks


def find_split_pattern(folder: Path, where: str) -> str:
    """Return the pattern that the folder's Python files assign to `pat_str`.

    Constant text and `"|".join([...])` of constant texts are read.

    Raises:
        DataError: No file assigns one, or two files assign different ones.
    """
    found = set[str]()
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {getattr(t, "id", getattr(t, "attr", "")) for t in targets}
                if names & set(PATTERN_NAMES) and (text := _constant_text(node.value)):
                    found.add(text)
    if len(found) == 1:
        return found.pop()
    raise DataError(
        f"{len(found) or 'no'} split patterns (`{PATTERN_NAMES[0]}`) in the Python files beside "
        "the tiktoken file",
        where=where,
        remedy="keep the model's own tokenization_*.py in the folder, or convert the tokenizer to "
        "tokenizer.json",
    )


def _constant_text(node: ast.expr) -> str:
    """Return a constant text, or constant texts joined by a constant; "" for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "join"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.List | ast.Tuple)
    ):
        between = _constant_text(node.func.value)
        parts = [_constant_text(part) for part in node.args[0].elts]
        return between.join(parts) if between and all(parts) else ""
    return ""


def copy_tokenizer_files(source_folder: Path, target_folder: Path) -> None:
    """Copy tokenizer, chat template and generation configuration to another model folder."""
    own_files = [] if (source_folder / "tokenizer.json").is_file() else OTHER_TOKENIZER_FILES
    for name in (
        *own_files,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, target_folder / name)
