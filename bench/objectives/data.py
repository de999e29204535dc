"""Real text from PERSEA_DATA: documents by domain, split by page over all languages, cut into
windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

# at most this many bytes; teacher and student texts are cut at the same places, so that no token
# crosses a cut
WINDOW = 256
TEACHES = {
    "A": ("zh", "ja", "ko", "vi", "id", "th"),
    "B": ("python", "json", "markdown", "en"),
    "C": ("math", "en"),
}
SCRIPTS = {
    "B": ("km", "my", "lo", "tha")
    # a world of its own: scripts that the student's tokenizer spells by bytes, and Thai, which it
    # does not
}


def domains_of(teaches: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return every domain once."""
    return tuple(dict.fromkeys(d for domains in teaches.values() for d in domains))


DOMAINS = domains_of(TEACHES)
ASKED = {
    d: who for teaches in (TEACHES, SCRIPTS) for who in reversed(teaches) for d in teaches[who]
}  # the teacher of each domain; B for English
SOURCES = {
    "zh": ("reactdocs.zh", "vuedocs.zh", "tldr.zh", "ud.chinese-gsdsimp", "ntrex.zho-CN"),
    "ja": ("pythondocs.ja", "reactdocs.ja", "tldr.ja", "ud.japanese-gsd", "ntrex.jpn"),
    "ko": ("reactdocs.ko", "tldr.ko", "ud.korean-kaist", "ntrex.kor"),
    "vi": ("reactdocs.vi", "ud.vietnamese-vtb", "ntrex.vie"),
    "id": ("reactdocs.id", "pythondocs.id", "tldr.id", "ud.indonesian-gsd", "ntrex.ind"),
    "th": (
        "ud.thai-tud",
        "ud.thai-pud",
        "tldr.th",
        "wisesight_neg.th",
        "wisesight_pos.th",
        "ntrex.tha",
    ),
    "python": ("mbpp",),
    "json": ("bfcl",),
    "markdown": ("tldr.en",),
    "en": ("ud.english-ewt", "ntrex.eng"),
    "math": ("gsm8k", "svamp"),
    "km": ("ntrex.khm",),
    "my": ("ntrex.mya",),
    "lo": ("ntrex.lao",),
    "tha": ("ntrex.tha",),  # the same 1,997 sentences in each
}


@dataclass(frozen=True)
class Document:
    """One page in one language.

    `page` is the same in every language of the page: it decides the split.
    """

    domain: str
    page: str
    text: str

    @property
    def part(self) -> str:
        """test (8 %), dev (4 %: for all searches) or train, by the digest of the page."""
        bucket = int.from_bytes(hashlib.sha256(self.page.encode()).digest()[:4], "big") % 100
        return "test" if bucket < 8 else "dev" if bucket < 12 else "train"


@dataclass(frozen=True)
class Window:
    """At most WINDOW bytes of one document."""

    domain: str
    page: str
    text: str


def data_folder() -> Path:
    return Path(
        os.environ.get("PERSEA_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
    )


@cache
def documents(data: Path, domain: str) -> tuple[Document, ...]:
    """Return all documents of a domain, NFC, in file order, without duplicates."""
    seen: dict[str, Document] = {}
    for source in SOURCES[domain]:
        for page, raw in _read(data, source):
            text = unicodedata.normalize("NFC", raw).replace("\r\n", "\n").strip()
            if text:
                seen.setdefault(text, Document(domain, page, text))
    return tuple(seen.values())


def page_of(name: str) -> str:
    """Return one name for a page in all its languages and file layouts."""
    name = re.sub(r"^pages(\.\w+)?/", "tldr/", name)
    python = re.fullmatch(r"python-newest\.(.*)/\w+\.po", name)
    if python:
        name = "python/" + python[1].replace("--", "/")
    elif name.endswith(".po"):
        name = "python/" + name.removesuffix(".po")
    return name.replace("_", ".")


def _read(data: Path, source: str) -> Iterator[tuple[str, str]]:
    if source.startswith("ntrex."):  # line k is the same sentence in every language
        lines = (data / "parallel" / f"{source}.txt").read_text().splitlines()
        yield from (
            (f"ntrex/{k // 10}", "\n".join(lines[k : k + 10])) for k in range(0, len(lines), 10)
        )
    elif source.startswith("wisesight"):
        lines = (data / "corpus" / f"{source}.txt").read_text().splitlines()
        yield from (
            (f"{source}/{k // 10}", "\n".join(lines[k : k + 10])) for k in range(0, len(lines), 10)
        )
    elif source == "mbpp":
        for line in (data / "eval" / "mbpp.jsonl").read_text().splitlines():
            task = json.loads(line)
            yield (
                f"mbpp/{task['task_id']}",
                "\n".join(
                    (f"# {task['text']}", task["code"].replace("\t", "    "), *task["test_list"])
                ),
            )
    elif source == "bfcl":
        for path in sorted((data / "eval" / "bfcl").glob("*.json")):
            for line in path.read_text().splitlines():
                yield f"bfcl/{json.loads(line)['id'].split('_')[-1]}", line
    elif source == "gsm8k":
        for k, line in enumerate((data / "eval" / "gsm8k.train.jsonl").read_text().splitlines()):
            task = json.loads(line)
            yield f"gsm8k/{k}", f"{task['question']}\n{task['answer']}"
    elif source == "svamp":
        for task in json.loads((data / "eval" / "svamp.json").read_text()):
            yield (
                f"svamp/{task['Body'][:40]}",
                f"{task['Body']}. {task['Question']}\n{task['Equation']} = {task['Answer']}",
            )
    else:
        for line in (data / "corpus" / f"{source}.jsonl").read_text().splitlines():
            page = json.loads(line)
            text = page["text"]
            if source.startswith(
                ("reactdocs", "vuedocs")
            ):  # the code is the same in every language and is not measured
                text = re.sub(r"```.*?(```|\Z)", "", text, flags=re.DOTALL)
            yield page_of(page["id"]), text


def windows(document: Document) -> list[Window]:
    """Cut the document at the end of a line or word if one is near, else between two characters."""
    raw, at, out = document.text.encode(), 0, []
    while at < len(raw):
        end = min(at + WINDOW, len(raw))
        if end < len(raw):
            near = max(
                raw.rfind(b"\n", at + WINDOW // 2, end), raw.rfind(b" ", at + WINDOW * 3 // 4, end)
            )
            end = near if near > 0 else end
            while raw[end] & 0xC0 == 0x80:
                end -= 1
        text = raw[at:end].decode()
        if unicodedata.is_normalized("NFC", text):  # a cut before a combining mark leaves none
            out.append(Window(document.domain, document.page, text))
        at = end
    return out


def pools(
    data: Path, part: str, *, per_document: int | None = None, domains: Sequence[str] = DOMAINS
) -> dict[str, list[Window]]:
    """Return windows of a split by domain, in an order that never changes."""
    out: dict[str, list[Window]] = defaultdict(list)
    for domain in domains:
        rng = np.random.default_rng([domains.index(domain), ("train", "dev", "test").index(part)])
        for document in documents(data, domain):
            if document.part == part:
                cut = windows(document)
                order = rng.permutation(len(cut))[:per_document]
                out[domain] += [cut[k] for k in sorted(order.tolist())]
        out[domain] = [out[domain][k] for k in rng.permutation(len(out[domain])).tolist()]
    return dict(out)
