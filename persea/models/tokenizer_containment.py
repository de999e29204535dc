"""Open an unknown tokenizer.json in a child process first: it could loop or allocate without end.

A regular expression can take exponential time, a normalizer can write megabytes for a letter, and
one token id of four billion makes a table of that length. So a tokenizer is opened once in a child
with limits, which encodes texts that are hard for regular expressions. The result is kept in
PERSEA_HOME by the file's digest. The child needs the tokenizers library alone.
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

from persea import storage
from persea.errors import DataError, StorageError

CONTAINMENT_VERSION = 1
MAX_LOAD_SECONDS = 20  # of CPU time: 262,144 tokens take 2 to 4
MAX_ENCODE_SECONDS = 2.0
MAX_MEMORY_BYTES = 3 << 30
WALL_FACTOR = 10  # a loaded machine gives the child little time
MAX_TOKENS_PER_CHARACTER = 64
REFUSED_EXIT_CODE = 4
RUN_LENGTH = 3000
# Runs of one kind of character, each followed by one that ends no match.
HARD_RUNS = ("a", "A", " ", "\n", "1", "é", "あ", "👍", "ab", "a ", "'s", "\r\n", "-", "_", "\t")
REMEDY = "fetch the tokenizer again from the model's own repository"


def refuse_endless_tokenizer(path: Path, where: str) -> None:
    """Refuse a tokenizer.json that cannot be opened and used within the limits.

    Args:
        path: The file.
        where: The place for error messages.

    Raises:
        DataError: The library cannot open it, or opening or encoding takes more than
            MAX_LOAD_SECONDS, MAX_ENCODE_SECONDS or MAX_MEMORY_BYTES.
    """
    key = f"{CONTAINMENT_VERSION}-{storage.digest_file(path)[:32]}"
    kept = storage.persea_home() / "tokenizers" / f"{key}.ends.json"
    if kept.is_file():
        return
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "persea.models.tokenizer_containment", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WALL_FACTOR * MAX_LOAD_SECONDS,
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
            else f"opening it and encoding {RUN_LENGTH:,} characters takes more than "
            f"{MAX_ENCODE_SECONDS:g} s or {MAX_MEMORY_BYTES >> 30} GB"
        )
        raise DataError(
            f"no tokenizer in {str(path.parent)!r}: {reason}", where=where, remedy=REMEDY
        )
    with suppress(StorageError):  # a cache that cannot be written costs time only
        storage.write_json(kept, {"ends": True})


def _refuse(message: str) -> None:
    sys.stdout.write(message)
    sys.stdout.flush()
    os._exit(REFUSED_EXIT_CODE)


def _main() -> None:
    """Open a tokenizer and encode hard texts, with limits; the exit code says whether it ends."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_LOAD_SECONDS, MAX_LOAD_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    try:
        definition = Path(sys.argv[1]).read_bytes()
        tokenizer = Tokenizer.from_str(definition.decode())
        # read back: the library accepts two tokens of one id, and cannot read what it then writes
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # the library raises plain exceptions
        _refuse((str(error).splitlines() or [type(error).__name__])[0])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # its default ends the process, also in Rust
    signal.setitimer(signal.ITIMER_PROF, MAX_ENCODE_SECONDS)
    for run in HARD_RUNS:
        text = run * (RUN_LENGTH // len(run)) + "!"
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            _refuse(f"it cannot encode {json.dumps(run)}: {str(error).splitlines()[0]}")
        if len(ids) > MAX_TOKENS_PER_CHARACTER * len(text):
            _refuse(f"it makes {len(ids):,} tokens of {len(text):,} characters")


if __name__ == "__main__":
    _main()
