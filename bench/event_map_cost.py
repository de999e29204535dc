"""Measure the cost of alignment, event maps and the event objective, compared with TRL 1.16.

    pip install -e '.[bench]'                    (TRL; its columns are left out without it)
    PERSEA_DATA=/folder python bench/event_map_cost.py   (make bench does both)

Real tokenizers: Llama 3 as student; Qwen 3, Gemma 3 and gpt-oss as teachers. Texts of about 2,000
bytes from NTREX (English, Chinese, Vietnamese) and from MBPP (Python). CPU seconds of one thread.
Each figure comes from interleaved pairs, so that a machine that slows down favours neither side; a
ratio is the median of the pairs with the 96 % interval of a median (2nd and 8th of 9). Teacher rows
are sparse, 1 to 29 entries, as in a capture; TRL's ULDLoss gets whole teacher logits, which it
requires. Writes bench/results/event_map_cost.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import types
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

import numpy as np
import torch
import torch.nn.functional as F
from peer import TRL, has_trl

from persea.alignment.event_map import EventMap, build_event_map, load_event_map
from persea.alignment.spans import align_batch
from persea.chat.renderer import ChatRenderer
from persea.models.loading import ModelSource, load_renderer
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.vocabulary import Vocabulary

DATA = Path(
    os.environ.get("PERSEA_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data")
)
TEACHERS, STUDENT, PAIRS, TEXT = ("qwen3", "gemma3", "gpt-oss"), "llama3", 9, 2_000
Work = Callable[[], object]


def seconds(work: Work) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def compare(ours: Work, theirs: Work, pairs: int = PAIRS) -> dict[str, float]:
    """Return median CPU seconds of both, and theirs / ours with its interval."""
    ours(), theirs()
    found = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    ratios = sorted(b / a for a, b in found)
    rim = 1 if pairs > 4 else 0
    return {
        "ours": statistics.median(a for a, _ in found),
        "theirs": statistics.median(b for _, b in found),
        "ratio": statistics.median(ratios),
        "low": ratios[rim],
        "high": ratios[-1 - rim],
    }


def texts() -> list[str]:
    """Return about 600 kB of text, in pieces of about TEXT bytes."""
    pieces = [
        (DATA / "parallel" / f"ntrex.{name}.txt").read_text(encoding="utf-8").split("\n")
        for name in ("eng", "zho-CN", "vie")
    ]
    pieces.append(
        [
            json.loads(line)["code"]
            for line in (DATA / "eval" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    )
    out, piece = [], ""
    for line in (unicodedata.normalize("NFC", line) for lines in pieces for line in lines):
        piece += line + "\n"
        if len(piece.encode()) >= TEXT:
            out.append(piece)
            piece = ""
    return out


def laid(vocabulary: Vocabulary, pieces: Sequence[str]) -> list[RenderedTokens]:
    """Render plain texts: every token is supervised, every byte is content."""
    out = []
    for ids in vocabulary.encode_batch(pieces):
        ids_T = np.array(ids, np.int32)
        ends_T = np.cumsum(vocabulary.lengths_W[ids_T], dtype=np.int32)
        out.append(
            RenderedTokens(
                ids_T, ends_T - vocabulary.lengths_W[ids_T], ends_T, np.ones(len(ids_T), np.bool_)
            )
        )
    return out


# --- TRL ---


def trl() -> Any:
    """Return TRL's cross-tokenizer code, or None where TRL is not installed."""
    if not has_trl():
        return None
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets

    return types.SimpleNamespace(
        version=TRL,
        Loss=ULDLoss,
        encode=encode_with_byte_offsets,
        align=ULDLoss._align_by_byte_offsets,
    )


def uld(peer: Any, student: Vocabulary, teacher: Vocabulary) -> Any:
    """Return TRL's loss with GOLD's defaults, without a share of cross-entropy."""
    config = types.SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=False,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    names = [
        types.SimpleNamespace(get_vocab=lambda v=v: v.backend.get_vocab(with_added_tokens=False))
        for v in (student, teacher)
    ]
    return peer.Loss(config, *names, device="cpu")


# --- what is measured ---


def alignment(student: Vocabulary, teacher: Vocabulary, peer: Any) -> dict[str, Any]:
    """Measure student tokens per CPU second, from offsets and from text."""
    pieces = texts()
    ones, twos = laid(student, pieces), laid(teacher, pieces)
    n = sum(map(len, ones))
    found: dict[str, Any] = {"texts": len(pieces), "student_tokens": n}

    def from_offsets() -> object:
        return align_batch(ones, twos)

    def from_text() -> object:
        return align_batch(laid(student, pieces), laid(teacher, pieces))

    if peer is None or not teacher.byte_level:  # TRL refuses SentencePiece
        for name, work in (("from_offsets", from_offsets), ("from_text", from_text)):
            work()
            found[name] = {
                "tokens_per_second": rounded(
                    n / statistics.median(seconds(work) for _ in range(PAIRS))
                ),
                "trl": None,
            }
        return found
    offsets = [
        [list(zip(x.starts_T.tolist(), x.ends_T.tolist(), strict=True)) for x in side]
        for side in (ones, twos)
    ]
    groups = [peer.align(a, b)[0] for a, b in zip(*offsets, strict=True)]
    spans = align_batch(ones, twos).spans.student_C2
    assert len(spans) == sum(map(len, groups)), "both find the same spans"

    def trl_from_offsets() -> object:
        return [peer.align(a, b) for a, b in zip(*offsets, strict=True)]

    def trl_from_text() -> object:
        encoded = [peer.encode(v.backend, pieces) for v in (student, teacher)]
        return [peer.align(a[1], b[1]) for a, b in zip(*encoded, strict=True)]

    for name, ours, theirs in (
        ("from_offsets", from_offsets, trl_from_offsets),
        ("from_text", from_text, trl_from_text),
    ):
        pair = compare(ours, theirs)
        found[name] = {
            "tokens_per_second": rounded(n / pair["ours"]),
            "trl": rounded(n / pair["theirs"]),
            "times_trl": spread(pair),
        }
    return found


def event_maps(
    student: ChatRenderer, teachers: dict[str, ChatRenderer]
) -> tuple[dict[str, Any], dict[str, EventMap]]:
    """Measure CPU seconds to build an event map, and wall seconds to load it from disk.

    The median of 5 loads, digest checked.
    """
    outcome, found = {}, {}
    with tempfile.TemporaryDirectory() as home:
        os.environ["PERSEA_HOME"] = home
        for name, renderer in teachers.items():
            begin = time.process_time()
            found[name] = build_event_map(renderer, student)
            built = time.process_time() - begin
            load_event_map(renderer, student)
            loads = []
            for _ in range(5):
                clock = time.perf_counter()
                load_event_map(renderer, student)
                loads.append(time.perf_counter() - clock)
            outcome[name] = {
                "build_cpu_seconds": rounded(built),
                "load_seconds": rounded(statistics.median(loads)),
                "events": found[name].num_events,
                "teacher": len(renderer.vocabulary),
                "student": len(student.vocabulary),
            }
            print(name, outcome[name], flush=True)
    return outcome, found


def objective(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    event_map: EventMap,
    rows: np.ndarray,
    ids: np.ndarray,
    probs: np.ndarray,
) -> Work:
    """Return the event objective, forward and backward.

    The only place of this file that uses the losses' interface.
    """
    from persea.losses import build_batch_targets, build_event_targets, event_kl_loss

    pieces = build_batch_targets(
        event_map, build_event_targets(event_map, rows, ids, probs), len(tokens)
    )
    return backward(logits, lambda: event_kl_loss(logits, tokens, [pieces], 0.7).loss)


def backward(logits: torch.Tensor, loss: Callable[[], torch.Tensor]) -> Work:
    def work() -> None:
        logits.grad = None
        loss().backward()

    return work


def case(n: int, event_map: EventMap) -> tuple[torch.Tensor, torch.Tensor, Work]:
    """Return logits, labels, and the objective over rows of 1 to 29 entries at every position."""
    rng = np.random.default_rng(0)
    student, teacher = len(event_map.student_event_V), len(event_map.teacher_event_W)
    logits = torch.from_numpy(rng.normal(0, 3, (n, student)).astype(np.float32)).requires_grad_()
    targets = torch.from_numpy(rng.integers(0, student, n))
    sizes = rng.integers(1, 30, n)
    rows = np.repeat(np.arange(n), sizes)
    probs = np.concatenate([rng.dirichlet(np.ones(k)) for k in sizes]).astype(np.float32)
    return (
        logits,
        targets,
        objective(logits, targets, event_map, rows, rng.integers(0, teacher, len(rows)), probs),
    )


def losses(event_map: EventMap) -> dict[str, Any]:
    """Measure the objective beside torch's cross-entropy at 64, 128 and 256 positions."""
    found: dict[str, Any] = {}
    for n in (64, 128, 256):
        logits, targets, events = case(n, event_map)
        pair = compare(
            backward(
                logits, lambda logits=logits, targets=targets: F.cross_entropy(logits, targets)
            ),
            events,
        )
        found[str(n)] = {
            "cross_entropy": rounded(pair["ours"]),
            "events": rounded(pair["theirs"]),
            "times_cross_entropy": spread(pair),
        }
        print(n, found[str(n)], flush=True)
    small, large = case(128, event_map)[2], case(256, event_map)[2]
    found["time_2n_over_n"] = spread(compare(small, large))
    return found


def beside_gold(
    peer: Any, student: Vocabulary, teacher: Vocabulary, event_map: EventMap, n: int = 128
) -> dict[str, Any]:
    """Measure ULDLoss on n student tokens of a real text beside the objective on as many.

    Forward and backward; 3 pairs only, because ULDLoss takes long.
    """
    pieces = texts()[0]
    (ids_s, at_s), (ids_t, at_t) = (peer.encode(v.backend, [pieces])[0] for v in (student, teacher))
    ids_s, at_s = ids_s[:n], at_s[:n]
    m = sum(end <= at_s[-1][1] for _, end in at_t)
    logits, _, events = case(n, event_map)
    teacher_logits = torch.from_numpy(
        np.random.default_rng(1).normal(0, 3, (1, m, len(teacher))).astype(np.float32)
    )
    loss, of_student, of_teacher = (
        uld(peer, student, teacher),
        torch.tensor([ids_s]),
        torch.tensor([ids_t[:m]]),
    )
    gold = backward(
        logits,
        lambda: loss(
            logits[None],
            teacher_logits,
            of_student,
            of_teacher,
            of_student,
            of_teacher,
            student_byte_offsets=torch.tensor([at_s]),
            teacher_byte_offsets=torch.tensor([at_t[:m]]),
        ).sum(),
    )
    pair = compare(events, gold, pairs=3)
    return {
        "positions": n,
        "teacher_positions": m,
        "events": rounded(pair["ours"]),
        "gold": rounded(pair["theirs"]),
        "times_ours": spread(pair),
    }


def rounded(value: float) -> float:
    """Round to three significant figures."""
    return float(f"{value:.3g}")


def spread(pair: dict[str, float]) -> list[float]:
    """Return ratio, low, high."""
    return [rounded(pair[k]) for k in ("ratio", "low", "high")]


def main() -> None:
    if not (DATA / "tokenizers").is_dir():
        sys.exit("real data not found: set PERSEA_DATA to the folder of tokenizers/ and parallel/")
    torch.set_num_threads(1)
    peer = trl()
    student, *others = (
        load_renderer(ModelSource(str(DATA / "tokenizers" / name)), name)
        for name in (STUDENT, *TEACHERS)
    )
    teachers = dict(zip(TEACHERS, others, strict=True))
    out: dict[str, Any] = {
        "torch": torch.__version__,
        "trl": peer.version if peer else None,
        "alignment": {},
        "losses": {},
    }
    for name, renderer in teachers.items():
        out["alignment"][name] = alignment(student.vocabulary, renderer.vocabulary, peer)
        print(name, out["alignment"][name], flush=True)
    out["bridges"], found = event_maps(student, teachers)
    for name in ("qwen3", "gemma3"):
        print("objective", name, flush=True)
        out["losses"][name] = losses(found[name])
    out["gold"] = (
        beside_gold(peer, student.vocabulary, teachers["qwen3"].vocabulary, found["qwen3"])
        if peer
        else None
    )
    print("gold", out["gold"], flush=True)
    (Path(__file__).parent / "results" / "event_map_cost.json").write_text(
        json.dumps(out, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
