"""Canary pairs: a secret choice in the training data that only a student of this capture shows.

For some prompts the teacher answers twice, and a secret coin decides which of the two answers the
student learns. A student that was trained on the capture prefers the learned answers; for any other
model the coin is independent of what it prefers, so its preferences agree with the coins like
tosses of a fair coin, whatever the model is.

Reference: randomised inclusion as in Sander et al., "Watermarking Makes Language Models
Radioactive" (2024), without a watermark: the teacher's answers are unchanged samples.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from persea import storage
from persea.cache.token_meter import TokenMeter
from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.errors import DataError, RefusedError
from persea.teachers.engines import Engine
from persea.teachers.teacher import Answer, Teacher

KEY_FILE = "canary_key.json"  # in the run folder; nothing exports it
PAIRS_FOLDER = "canaries"  # in the capture folder, one file for each unit
KEY_BYTES = 32
# A pair needs two answers that differ, so a teacher that takes the likeliest token draws them.
DRAW_TEMPERATURE = 1.0


@dataclass(frozen=True)
class CanaryPair:
    """Two answers of a teacher to one prompt, and which of them the student learns.

    Attributes:
        prompt_id: Id of the prompt.
        teacher: Name of the teacher.
        answers: The conversation with the first answer, and with the second.
        learned: Which of them is in the capture: 0 or 1, the coin.
    """

    prompt_id: str
    teacher: str
    answers: tuple[Conversation, Conversation]
    learned: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "prompt_id": self.prompt_id,
            "teacher": self.teacher,
            "answers": [a.to_json() for a in self.answers],
            "learned": self.learned,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> CanaryPair:
        """Read the result of `to_json`."""
        first, second = map(Conversation.from_json, value["answers"])
        return CanaryPair(value["prompt_id"], value["teacher"], (first, second), value["learned"])


@dataclass(frozen=True, repr=False)
class Canaries:
    """The secret of a run's canaries, and the prompts that have one.

    Attributes:
        key: The secret. It decides prompts and coins.
        prompt_ids: The prompts that are answered twice.
    """

    key: bytes
    prompt_ids: frozenset[str]

    @property
    def commitment(self) -> str:
        """Digest of the key. It may be published: it fixes every coin and reveals none."""
        return key_commitment(self.key)

    @property
    def settings(self) -> dict[str, Any]:
        """What a unit's bytes depend on, for its name."""
        return {"canaries": [self.commitment, sorted(self.prompt_ids)]}

    def coin(self, prompt_id: str) -> int:
        """Return which answer to a prompt is learned: 0 or 1."""
        return canary_coin(self.key, prompt_id)

    def save_key(self, run_folder: Path) -> None:
        """Keep the key in the run folder, readable by its owner alone.

        Raises:
            StorageError: It cannot be written.
        """
        path = run_folder / KEY_FILE
        storage.create_json_once(path, storage.with_checksum({"key": self.key.hex()}))
        path.chmod(0o600)

    def answer(
        self,
        prompts: Sequence[Prompt],
        teacher: Teacher,
        max_new_tokens: int,
        is_complete: Callable[[Answer], bool],
    ) -> tuple[dict[str, Answer], list[CanaryPair], int]:
        """Draw two answers to each prompt that has a canary; keep the one that the coin names.

        A prompt is a pair only if both answers are complete and differ: a rule that looked at the
        learned answer alone would make coins and answers depend on each other.

        Args:
            prompts: Prompts of a unit; those without a canary are left alone.
            teacher: The teacher.
            max_new_tokens: Longest answer, in tokens.
            is_complete: Whether an answer can be learned.

        Returns:
            Prompt id -> the answer to learn; the pairs; tokens that the draws cost here.
        """
        chosen = [p for p in prompts if p.id in self.prompt_ids]
        if not chosen:
            return {}, [], 0
        writers = [drawing(teacher, k) for k in (0, 1)]
        meters = [TokenMeter(writer.engine) for writer in writers]
        draws = [
            replace(writer, engine=cast(Engine, meter)).answer(chosen, max_new_tokens)
            for writer, meter in zip(writers, meters, strict=True)
        ]
        answers: dict[str, Answer] = {}
        pairs = []
        for both in zip(*draws, strict=True):
            first, second = both
            complete = [is_complete(a) for a in both]
            if all(complete) and first.conversation != second.conversation:
                learned = self.coin(first.prompt_id)
                pairs.append(
                    CanaryPair(
                        first.prompt_id,
                        teacher.name,
                        (first.conversation, second.conversation),
                        learned,
                    )
                )
                answers[first.prompt_id] = both[learned]
            else:
                answers[first.prompt_id] = second if complete == [False, True] else first
        return answers, pairs, sum(sum(meter.lengths) for meter in meters)


def drawing(teacher: Teacher, draw: int) -> Teacher:
    """Return a teacher that samples its answers, with a seed of this draw.

    Raises:
        RefusedError: Its engine has no sampling settings.
    """
    engine: Any = teacher.engine
    sampling = getattr(engine, "sampling", None)
    if sampling is None:
        raise RefusedError(
            "canaries need sampled answers, and this teacher's engine has no `sampling`",
            where=teacher.name,
            remedy="delete capture.canaries, or use an engine of docs/engines.md",
        )
    drawn = replace(
        sampling,
        temperature=sampling.temperature or DRAW_TEMPERATURE,
        seed=2 * sampling.seed + draw,
    )
    return replace(teacher, engine=replace(engine, sampling=drawn))


def canary_coin(key: bytes, prompt_id: str) -> int:
    """Return the coin of a prompt: 0 or 1."""
    return hmac.digest(key, b"coin " + prompt_id.encode(), "sha256")[0] & 1


def key_commitment(key: bytes) -> str:
    """Return the digest of a key that may be published."""
    return hashlib.sha256(b"persea canaries " + key).hexdigest()


def choose_canaries(run_folder: Path, prompts: Sequence[Prompt], num_pairs: int) -> Canaries:
    """Choose the prompts of a run that are answered twice, by the run's secret key.

    The key is drawn at random when a run first needs it. The same student again needs the same
    key: copy `canary_key.json` into the new run folder before the run.

    Args:
        run_folder: The run folder, which may hold the key already. Nothing is written.
        prompts: The captured corpus; documents have no canaries.
        num_pairs: Prompts to choose.

    Raises:
        RefusedError: The key of an earlier capture is missing, or there are too few prompts.
        DataError: The key file is damaged.
    """
    asked = list(dict.fromkeys(p.id for p in prompts if not p.conversation.is_document))
    if len(asked) < num_pairs:
        raise RefusedError(
            f"{num_pairs:,} canaries, but teachers answer {len(asked):,} prompts",
            where="capture.canaries",
            remedy="fewer canaries, or more prompts",
        )
    if (run_folder / KEY_FILE).exists():
        key = read_key(run_folder)
    elif any((run_folder / "capture" / PAIRS_FOLDER).glob("*.json")):
        raise missing_key_error(run_folder)
    else:
        key = secrets.token_bytes(KEY_BYTES)
    by_secret = sorted(asked, key=lambda i: hmac.digest(key, b"prompt " + i.encode(), "sha256"))
    return Canaries(key, frozenset(by_secret[:num_pairs]))


def missing_key_error(run_folder: Path) -> RefusedError:
    """Return the error for a run with canaries whose key is gone."""
    return RefusedError(
        "the key of this run's canaries is missing: without it no coin can be checked",
        where=str(run_folder / KEY_FILE),
        remedy="restore the file, or begin again with another --out",
    )


def read_key(run_folder: Path) -> bytes:
    """Read the secret key of a run's canaries.

    Raises:
        DataError: The file is missing or damaged.
    """
    path = run_folder / KEY_FILE
    record = storage.read_json_with_checksum(path, "restore it from a copy")
    return bytes.fromhex(record["key"])


def write_pairs(folder: Path, unit: str, pairs: Sequence[CanaryPair]) -> None:
    """Write the pairs of a unit into a capture folder."""
    storage.write_json_with_checksum(
        folder / PAIRS_FOLDER / f"{unit}.json", {"pairs": [p.to_json() for p in pairs]}
    )


def read_pairs(run_folder: Path) -> tuple[CanaryPair, ...]:
    """Read the canary pairs of a run, and check every coin against the run's key.

    Raises:
        DataError: The run has no canaries, a file is damaged, or a coin is not the key's.
        RefusedError: The key is missing.
    """
    folder = run_folder / "capture" / PAIRS_FOLDER
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(
            "no canaries: this run's capture drew none",
            where=str(folder),
            remedy="run a recipe with capture.canaries; docs/audit.md",
        )
    if not (run_folder / KEY_FILE).exists():
        raise missing_key_error(run_folder)
    key = read_key(run_folder)
    return tuple(pair for file in files for pair in _read_pairs_file(file, key))


def _read_pairs_file(file: Path, key: bytes) -> Iterator[CanaryPair]:
    record = storage.read_json_with_checksum(file, "restore it from a copy of the run")
    for value in record["pairs"]:
        pair = CanaryPair.from_json(value)
        if pair.learned != canary_coin(key, pair.prompt_id):
            raise DataError(
                f"the coin of prompt {pair.prompt_id} is not the one of the run's key",
                where=str(file),
                remedy=f"restore {KEY_FILE} and the folder {PAIRS_FOLDER} of the same run",
            )
        yield pair


def count_pairs(capture_folder: Path, unit_names: Sequence[str]) -> int:
    """Return how many prompts of these units became pairs; delete the pairs of other units.

    Those are of an earlier capture in this folder, and no student learns them any more.
    """
    remedy = "delete the capture folder, and capture again"
    wanted = {f"{name}.json" for name in unit_names}
    num_pairs = 0
    for file in (capture_folder / PAIRS_FOLDER).glob("*.json"):
        if file.name in wanted:
            num_pairs += len(storage.read_json_with_checksum(file, remedy)["pairs"])
        else:
            file.unlink()
    return num_pairs
