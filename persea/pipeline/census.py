"""Count and sample a corpus that is too large to read for a plan.

Lines of a file are counted and some of them are read; a generator is asked for some of its
questions. What the run leaves out as repeated is not left out here: counts are upper bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from persea.config.data_sections import CorpusSection
from persea.config.schema import TrainingSection
from persea.config.size_defaults import resolve_steps
from persea.data.formats import read_prompts
from persea.data.prompts import Corpus, Prompt
from persea.data.tables import TableRow, iter_table
from persea.data.text_files import read_documents
from persea.pipeline.run_context import RunContext
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split

if TYPE_CHECKING:
    from persea.config.recipe import Recipe

LARGE_CORPUS = 50_000  # prompts; a smaller corpus is read whole, and its repetitions are counted
SAMPLED_ROWS = 256  # of each part of a large corpus
BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class PartCount:
    """One part of a corpus.

    Attributes:
        part: The recipe's section.
        rows: Its prompts or texts, before repetitions are left out; None = not known.
    """

    part: CorpusSection
    rows: int | None


def count_parts(recipe: Recipe) -> list[PartCount]:
    """Count the prompts and texts of each part, without reading them.

    A file of JSON lines is counted by its lines, one of Parquet by its metadata. Other files, and
    data sets of the hub, have no count.
    """
    return [PartCount(part, _count_rows(part)) for part in recipe.corpus]


def _count_rows(part: CorpusSection) -> int | None:
    if part.generate is not None:
        return part.generate
    if part.hub is not None:
        return None
    return count_file(Path(part.file or part.texts or ""))


def count_file(path: Path) -> int | None:
    """Return the rows of a table, or of a folder of tables; None = they must be read to count."""
    if path.is_dir():
        counts = [count_file(p) for p in sorted(path.iterdir()) if p.is_file()]
        known = [n for n in counts if n is not None]
        return sum(known) if known and len(known) == len(counts) else None
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(path).metadata.num_rows)
    if path.suffix in (".jsonl", ".ndjson"):
        return _count_lines(path)
    return None


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def is_large(recipe: Recipe) -> bool:
    """Return whether a corpus is counted and sampled instead of read."""
    return sum(count.rows or 0 for count in count_parts(recipe)) > LARGE_CORPUS


@dataclass(eq=False)
class SampledContext(RunContext):
    """A run whose corpus is counted and sampled.

    Attributes:
        counts: The parts of the corpus.
    """

    counts: tuple[PartCount, ...] = field(default=(), kw_only=True)

    @cached_property
    def corpus(self) -> Corpus:
        """The sampled prompts and texts, without splitting long texts."""
        return Corpus(tuple(p for c in self.counts for p in sample_part(c.part, self.recipe)), ())

    @property
    def num_prompts(self) -> int:
        """Prompts and texts of the corpus, repetitions among them."""
        return sum(self.prompts_by_skill.values())

    @cached_property
    def prompts_by_skill(self) -> dict[str, int]:
        """Skill -> prompts and texts."""
        found: dict[str, int] = {}
        for count in self.counts:
            found[count.part.skill] = found.get(count.part.skill, 0) + (count.rows or 0)
        return found

    @cached_property
    def training(self) -> TrainingSection:
        """The section `training` in steps of the counted corpus."""
        training = self.recipe.training
        if training.num_train_epochs is None and training.warmup_ratio is None:
            return training
        return resolve_steps(training, self.num_prompts)


def sampled_context(context: RunContext) -> RunContext:
    """Return the context itself, or one that samples where the corpus is large."""
    counts = count_parts(context.recipe)
    if sum(count.rows or 0 for count in counts) <= LARGE_CORPUS:
        return context
    counts = [
        c if c.rows is not None else replace(c, rows=sum(1 for _ in _read_all(c.part)))
        for c in counts
    ]
    return SampledContext(
        context.recipe,
        context.folder,
        context.launch_options,
        task_files=context.task_files,
        counts=tuple(counts),
    )


def _read_all(part: CorpusSection) -> Iterator[object]:
    return iter_table(Path(part.file or part.texts or "")) if part.hub is None else iter(())


def sample_part(
    part: CorpusSection, recipe: Recipe, most: int = SAMPLED_ROWS
) -> tuple[Prompt, ...]:
    """Return some prompts or texts of a part, evenly spaced over a file of JSON lines.

    Rows that are malformed are left out: the run reports them.

    Args:
        part: The part.
        recipe: The recipe, for its seed.
        most: Prompts, at most.
    """
    if part.generate is not None:
        task = next((t for t in GENERATED_TASKS if t.name == part.skill), None)
        items = task.items(Split.TRAIN, min(part.generate, most), recipe.seed) if task else ()
        return tuple(replace(i.prompt, answer=i.reference) for i in items)
    path = Path(part.file or part.texts or "")
    if part.hub is not None or not path.exists():
        return ()
    rows: Iterator[TableRow] | Path = path
    if path.suffix in (".jsonl", ".ndjson"):
        rows = _spaced_rows(path, most)
    elif path.suffix != ".txt":
        rows = islice(iter_table(path), most)
    if part.texts is not None:
        from persea.chat.messages import Conversation

        documents = read_documents(rows, part.column or "", lambda line: None)
        return tuple(
            Prompt(name, Conversation.from_document(text), part.skill, part.language)
            for name, text in documents
        )
    found = read_prompts(rows, part.skill, part.language, lambda line: None, columns=part.columns)
    return tuple(found)


def _spaced_rows(path: Path, most: int) -> Iterator[TableRow]:
    """Yield the rows that begin after evenly spaced offsets."""
    size, seen = path.stat().st_size, -1
    with path.open("rb") as file:
        for k in range(most):
            file.seek(k * size // most)
            if k:
                file.readline()  # the rest of a line
            begin = file.tell()
            if begin <= seen or begin >= size:
                continue
            line, seen = file.readline(), begin
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if line.strip():
                name = f"{path.name}@{begin}"
                yield TableRow(f"{path}@{begin}", name, value)
