"""Open an unknown tokenizer in a child process first: it could loop or allocate without end.

A regular expression can take exponential time, a normalizer can write megabytes for a letter, and
one token id of four billion makes a table of that length. So a tokenizer is opened once in a child
with limits, which encodes texts that are hard for regular expressions. The limits are CPU time: a
busy machine refuses no good tokenizer, and a bad one ends after the same work. The result is kept
in PERSEA_HOME by the digest of the files. For a tokenizer.json the child needs the tokenizers
library alone; for other forms (vocab.json and merges.txt, tiktoken, tokenizer.model) it opens the
folder as persea does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

CONTAINMENT_VERSION = 2
# CPU seconds to open a tokenizer. One of 262,144 tokens has 33 MB and takes 2 to 4 s; a file of a
# few kilobytes that takes longer than the first number does not end by itself.
LOAD_SECONDS, LOAD_SECONDS_PER_MB = 1.2, 0.5
# A tokenizer in another form is converted, in Python.
CONVERT_FACTOR = 4
MAX_ENCODE_SECONDS = 1.0
MAX_MEMORY_BYTES = 3 << 30
WALL_FACTOR = 10  # a loaded machine gives the child little time
START_SECONDS = 20  # wall seconds that the child may take for its own imports, before the factor
MAX_TOKENS_PER_CHARACTER = 64
REFUSED_EXIT_CODE = 4
RUN_LENGTH = 3000
# Runs of one kind of character, each followed by one that ends no match.
HARD_RUNS = ("a", "A", " ", "\n", "1", "é", "あ", "👍", "ab", "a ", "'s", "\r\n", "-", "_", "\t")
REMEDY = "fetch the tokenizer again from the model's own repository"
# Files that a tokenizer in another form than tokenizer.json is made of: one of these, and others.
VOCABULARY_PATTERNS = ("vocab.json", "vocab.txt", "*.tiktoken", "*.model", "tekken.json")
OTHER_PATTERNS = (
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenization_*.py",
)


def refuse_endless_tokenizer(path: Path, where: str) -> None:
    """Refuse a tokenizer that cannot be opened and used within the limits.

    Args:
        path: A tokenizer.json, or a model folder whose tokenizer has another form.
        where: The place for error messages.

    Raises:
        DataError: The library cannot open it, or opening takes more than `load_seconds`, encoding
            more than MAX_ENCODE_SECONDS, or both more than MAX_MEMORY_BYTES.
    """
    from persea import storage  # here: the child starts faster without it
    from persea.errors import DataError, StorageError

    files = tokenizer_files(path)
    if not files:
        return  # nothing to open, which the library says
    digests = [[f.name, storage.digest_file(f)] for f in files]
    digest = digests[0][1] if path.is_file() else storage.digest_json(digests)
    kept = storage.persea_home() / "tokenizers" / f"{CONTAINMENT_VERSION}-{digest[:32]}.ends.json"
    if kept.is_file():
        return
    seconds = load_seconds(path, files)
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "persea.models.tokenizer_containment", str(path), str(seconds)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WALL_FACTOR * (seconds + MAX_ENCODE_SECONDS) + START_SECONDS * WALL_FACTOR,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RUST_BACKTRACE": "0"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        code, message = 1, ""
    else:
        code, message = ended.returncode, ended.stdout.decode(errors="replace").strip()
    if code:
        reason = (
            message[:200]
            if code == REFUSED_EXIT_CODE and message
            else f"opening it takes more than {seconds:.1f} s, encoding {RUN_LENGTH:,} "
            f"characters takes more than {MAX_ENCODE_SECONDS:g} s, or one of them takes more than "
            f"{MAX_MEMORY_BYTES >> 30} GB"
        )
        folder = path.parent if path.is_file() else path
        raise DataError(f"no tokenizer in {str(folder)!r}: {reason}", where=where, remedy=REMEDY)
    with suppress(StorageError):  # a cache that cannot be written costs time only
        storage.write_json(kept, {"ends": True})


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files that a tokenizer is made of: one, or those of a folder; [] without any."""
    if path.is_file():
        return [path]
    found = {f for p in VOCABULARY_PATTERNS for f in path.glob(p) if f.is_file()}
    others = {f for p in OTHER_PATTERNS for f in path.glob(p) if f.is_file()}
    return sorted(found | others) if found else []


def load_seconds(path: Path, files: list[Path]) -> float:
    """Return the CPU seconds that a tokenizer may take to open, by the size of its files."""
    num_bytes = sum(f.stat().st_size for f in files)
    factor = 1 if path.is_file() else CONVERT_FACTOR
    return factor * (LOAD_SECONDS + LOAD_SECONDS_PER_MB * num_bytes / 1e6)


def _refuse(message: str) -> None:
    sys.stdout.write(message)
    sys.stdout.flush()
    os._exit(REFUSED_EXIT_CODE)


def _limit_cpu(seconds: float) -> None:
    """End this process after so many more seconds of CPU time, also inside of Rust."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    """Allow MAX_MEMORY_BYTES besides the libraries that are loaded already."""
    used = 0
    with suppress(OSError, ValueError, IndexError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + MAX_MEMORY_BYTES
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _open_definition(path: Path, seconds: float) -> Any:
    """Open a tokenizer.json with the tokenizers library."""
    from tokenizers import Tokenizer

    _limit_memory()
    _limit_cpu(seconds)
    tokenizer = Tokenizer.from_str(path.read_bytes().decode())
    # read back: the library accepts two tokens of one id, and cannot read what it then writes
    return Tokenizer.from_str(tokenizer.to_str())


def _open_folder(folder: Path, seconds: float) -> Any:
    """Open a tokenizer of another form, as `persea.models.loading.load_tokenizer` does."""
    import transformers

    from persea.models.tokenizer_files import open_tokenizer_file

    transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer  # noqa: B018 (imports them)
    _limit_memory()
    _limit_cpu(seconds)
    opened = open_tokenizer_file(folder, "")
    if opened is None:
        opened = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return opened.backend_tokenizer


def _main() -> None:
    """Open a tokenizer and encode hard texts, with limits; the exit code says whether it ends."""
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        is_file = path.is_file()
        tokenizer = _open_definition(path, seconds) if is_file else _open_folder(path, seconds)
    except MemoryError:
        os._exit(1)
    except Exception as error:  # the libraries raise plain exceptions
        if not path.is_file():
            os._exit(0)  # it ended: the parent opens it, and names what is wrong
        _refuse((str(error).splitlines() or [type(error).__name__])[0])
    _limit_cpu(MAX_ENCODE_SECONDS)
    for run in HARD_RUNS:
        text = run * (RUN_LENGTH // len(run)) + "!"
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            _refuse(f"it cannot encode {json.dumps(run)}: {str(error).splitlines()[0]}")
        if len(ids) > MAX_TOKENS_PER_CHARACTER * len(text):
            _refuse(f"it makes {len(ids):,} tokens of {len(text):,} characters")
    os._exit(0)  # taking the libraries down costs more than a second


if __name__ == "__main__":
    _main()
