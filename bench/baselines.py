"""Other methods for distillation between two tokenizers, as torch functions. Never persea defaults.

Each function takes student logits and teacher probabilities at positions where both tokenizers
begin a token at the same byte (persea.alignment.spans.common_boundaries) and returns one divergence
per position. `composed` mixes a divergence with cross-entropy in the same way as persea's own
objective, so that all methods are compared under one composition. bench/bias.py (make bench-bias)
measures the bias of each on distributions that are known exactly.

Shapes: N positions, V student vocabulary, W teacher vocabulary, K shared tokens, C chunks, S and T
tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from persea.chat.renderer import ChatRenderer


def composed(
    divergence_N: torch.Tensor, row_N: torch.Tensor, cross_entropy_L: torch.Tensor, share: float
) -> torch.Tensor:
    """Return the mean over L supervised positions, each of weight one.

    share * divergence + (1 - share) * cross-entropy at the positions row_N (indices into L) where
    the method applies, full cross-entropy elsewhere.
    """
    loss_L = cross_entropy_L.index_add(0, row_N, share * (divergence_N - cross_entropy_L[row_N]))
    return loss_L.mean()


def sft(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy on the answer's own tokens, nats, [N].

    Unbiased, but uses nothing of the teacher except the text.
    """
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


# --- the shared part of two vocabularies ---


@dataclass(frozen=True)
class Shared:
    """Byte strings in both vocabularies, ids side by side; the token that ends the turn is one
    of them.
    """

    teacher_K: torch.Tensor
    student_K: torch.Tensor


def shared(teacher: ChatRenderer, student: ChatRenderer) -> Shared:
    """Match tokens by bytes (by strings only 25,036 of Gemma's and Llama's 86,434 would match).

    Of several stop tokens the first counts.
    """
    of_student = {b: i for i, b in enumerate(student.vocabulary.bytes_W) if b is not None}
    pairs = [
        (i, of_student[b])
        for i, b in enumerate(teacher.vocabulary.bytes_W)
        if b is not None and b in of_student
    ]
    pairs.append((teacher.stop_ids[0], student.stop_ids[0]))
    return Shared(torch.tensor([i for i, _ in pairs]), torch.tensor([i for _, i in pairs]))


def strict(
    logits_NV: torch.Tensor,
    probs_NW: torch.Tensor,
    both: Shared,
    *,
    reverse: bool = False,
    top: int | None = None,
) -> torch.Tensor:
    """Return KL(teacher || student), or reverse, over shared tokens only, renormalised; nats, [N].

        P'(k) = P(k) / P(K),  Q'(k) = Q(k) / Q(K),  KL(P' || Q')

    arXiv 2610.08448: reverse=True, top=16 (the student's 16 likeliest shared tokens), at positions
    where one student token matches one teacher token; the caller chooses the positions. Biased:
    tokens of one side only are removed as if they shared no bytes with the other side's tokens, and
    a realised 1:1 position carries information about the next bytes. A position where the teacher
    gives no shared token any mass counts 0.
    """
    p_NK, log_q_NK = (
        probs_NW[:, both.teacher_K],
        torch.log_softmax(logits_NV[:, both.student_K], -1),
    )
    if top is not None and top < log_q_NK.shape[1]:
        at_NK = log_q_NK.detach().topk(top, -1).indices
        p_NK, log_q_NK = p_NK.gather(1, at_NK), torch.log_softmax(log_q_NK.gather(1, at_NK), -1)
    mass_N = p_NK.sum(-1)
    says = mass_N > 0
    p_NK = p_NK[says] / mass_N[says, None]
    log_q_NK = log_q_NK[says]
    if reverse:
        if bool((p_NK == 0).any()):
            raise ValueError(
                "reverse KL is infinite where the teacher's probability is 0: "
                "it needs whole softmax rows, not sampled ones"
            )
        kl = (log_q_NK.exp() * (log_q_NK - p_NK.log())).sum(-1)
    else:
        kl = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(-1)
    return torch.zeros_like(logits_NV[:, 0]).index_put((says.nonzero()[:, 0],), kl)


# --- no identity at all ---


def uld(logits_NV: torch.Tensor, probs_NW: torch.Tensor) -> torch.Tensor:
    """Return the L1 distance between both sorted rows, the shorter padded with zeros; [N], at most
    2.

        sum_k | sort(P)_k - sort(Q)_k |

    Boizard et al., Universal Logit Distillation, arXiv 2402.12030. Published with positions paired
    by index; here the caller gives positions at common boundaries, which favours it. Biased: the
    k-th likeliest tokens of two vocabularies are different events; any permutation of the student's
    tokens has the same loss.
    """
    q_NV = torch.softmax(logits_NV, -1)
    width = max(q_NV.shape[1], probs_NW.shape[1])
    p = F.pad(probs_NW, (0, width - probs_NW.shape[1])).sort(-1, descending=True).values
    q = F.pad(q_NV, (0, width - q_NV.shape[1])).sort(-1, descending=True).values
    return (p - q).abs().sum(-1)


# --- longest prefix (BPM) ---


def longest_prefix(
    teacher: ChatRenderer, student: ChatRenderer, emitted: bytes = b""
) -> torch.Tensor:
    """Return for each teacher token the longest student token that is a prefix of its bytes.

    int64 [W]; -1 for control tokens. Stop tokens match. With `emitted`: the student has already
    written these bytes of the teacher token; then the rest of its bytes counts, and tokens that do
    not continue them get -1.
    """
    of_student = {b: i for i, b in enumerate(student.vocabulary.bytes_W) if b}
    longest = max(map(len, of_student))
    out = torch.full((len(teacher.vocabulary),), -1, dtype=torch.int64)
    for w, raw in enumerate(teacher.vocabulary.bytes_W):
        if raw and len(raw) > len(emitted) and raw.startswith(emitted):
            rest = raw[len(emitted) :]
            out[w] = next(
                (
                    of_student[rest[:n]]
                    for n in range(min(longest, len(rest)), 0, -1)
                    if rest[:n] in of_student
                ),
                -1,
            )
    if not emitted:
        out[list(teacher.stop_ids)] = student.stop_ids[0]
    return out


def bpm(logits_NV: torch.Tensor, probs_NW: torch.Tensor, prefix_W: torch.Tensor) -> torch.Tensor:
    """Teacher mass moved to the longest student token that prefixes each token; KL to the student's
    whole row; nats, [N].

        t(u) = sum_{w: prefix(w) = u} P(w) / sum_{w: prefix(w) >= 0} P(w),   KL(t || Q)

    Byte-Prefix Marginalization, arXiv 2607.22334: its root projection, and with
    `longest_prefix(..., emitted)` its rows inside a teacher token (conditioned on the bytes
    written). Left out: its correction of a student token that crosses a teacher boundary, its
    residual bucket (empty where a student has all 256 bytes) and its stop rule. Biased: the longest
    prefix is often no token the student's own tokenizer would write (Indonesian, Gemma to Llama: 20
    % of rows), and the teacher's boundary tells the future.
    """
    known = prefix_W >= 0
    t_NV = torch.zeros_like(logits_NV).index_add(
        1, prefix_W[known].to(logits_NV.device), probs_NW[:, known].to(logits_NV.dtype)
    )
    mass_N = t_NV.sum(-1)
    says = mass_N > 0
    t_NV = t_NV[says] / mass_N[says, None]
    kl = (torch.xlogy(t_NV, t_NV) - t_NV * torch.log_softmax(logits_NV[says], -1)).sum(-1)
    return torch.zeros_like(logits_NV[:, 0]).index_put((says.nonzero()[:, 0],), kl)


# --- chunk likelihood (ALM) ---


def chunk_logprobs(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, chunk_N: torch.Tensor, chunks: int
) -> torch.Tensor:
    """Return the natural log-probability of each chunk, [C]: the sum over its positions.

    chunk_N names the chunk of each position; -1 = in no chunk.
    """
    logprob_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
    inside = chunk_N >= 0
    return torch.zeros(chunks, dtype=logits_NV.dtype, device=logits_NV.device).index_add(
        0, chunk_N[inside], logprob_N[inside]
    )


def chunk_likelihood(
    student_C: torch.Tensor,
    teacher_C: torch.Tensor,
    *,
    temperature: float = 100.0,
    correction_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the binary KL between the tempered probabilities of the realised chunk; nats, [C].

        p = P_T(chunk)^(1/temperature),  q = P_S(chunk)^(1/temperature)
        p log(p/q) + (1-p) log((1-p)/(1-q))

    Approximate Likelihood Matching (Minixhofer, Vulic, Ponti, arXiv 2503.20083), its unconstrained
    form with KL. It uses only the realised path, one number per chunk. Biased: P_T(chunk) is
    conditioned on the teacher's boundary, P_S(chunk) on the student's; equal distributions give
    .03-.23 nats per chunk on bench/worlds.py. Debiased with

        correction = (log b_T(end) - log b_T(start)) - (log b_S(end) - log b_S(start))

    added to the teacher's log-probability, where b is the probability that the other tokenizer has
    a boundary there too: exactly 0 for equal distributions. student_C, teacher_C are natural
    log-probabilities < 0.
    """
    teacher_C = teacher_C if correction_C is None else teacher_C + correction_C
    if bool((teacher_C > 1e-6).any()):
        raise ValueError(
            "a chunk has a probability above 1: the correction belongs to other chunks, "
            "or the inputs are not log-probabilities"
        )
    tiny = torch.finfo(
        student_C.dtype
    ).eps  # a chunk that is certain on both sides has loss 0 and log(1-p) = -inf
    log_p, log_q = (x.clamp(max=-tiny * temperature) / temperature for x in (teacher_C, student_C))
    not_p, not_q = (torch.log(-torch.expm1(x)) for x in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) + not_p.exp() * (not_p - not_q)


# --- GOLD, TRL's own ---


@dataclass(frozen=True)
class Sequence:
    """One tokenizer's view of one text, for `gold`. T tokens, the first of them of the prompt.

    logits_TV   row k predicts token k + 1
    ids_T       int64
    learned_T   bool: the answer, without a gap
    starts_T, ends_T  bytes of the answer that each token covers, int64; any value for prompt tokens
    """

    logits_TV: torch.Tensor
    ids_T: torch.Tensor
    learned_T: torch.Tensor
    starts_T: torch.Tensor
    ends_T: torch.Tensor


def gold(
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    *,
    merge: str = "observed",
    hybrid: bool = True,
    extended: bool = True,
    cross_entropy: float = 0.0,
    **options: Any,
) -> Any:
    """Return TRL's own ULDLoss with TRL's defaults (1.16.0; `pip install 'persea[bench]'`).

    The tokenizers need `get_vocab()` only. GOLD (Patiño et al., Hugging Face, 2025-10): spans by
    byte offsets; probabilities are merged within a span; JSD over tokens whose STRINGS are equal,
    sorted L1 over the rest (hybrid=True), weighted by the share of matched tokens. hybrid=False is
    extended ULD. merge="observed", TRL's default, multiplies the first row by the later tokens'
    probabilities, and takes logits one position late; "bayesian" (opt-in) corrects both. Biased:
    unnormalised parts are compared, a span's last rows belong to other contexts, strings of two
    families differ where their bytes agree.
    """
    try:
        from trl.experimental.gold import GOLDConfig
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError as error:
        raise SystemExit(
            "GOLD is TRL's own code: pip install 'persea[bench]' (trl==1.16.0)"
        ) from error
    config = GOLDConfig(
        output_dir="unused",
        use_uld_loss=True,
        use_cpu=True,
        bf16=False,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=hybrid,
        use_extended_uld=extended,
        uld_crossentropy_weight=cross_entropy,
        **options,
    )
    return ULDLoss(config, student_tokenizer=student_tokenizer, teacher_tokenizer=teacher_tokenizer)


def gold_loss(
    loss: Callable[..., torch.Tensor], student: Sequence, teacher: Sequence
) -> torch.Tensor:
    """Apply TRL's loss to one sequence; returns a scalar."""

    def labels(side: Sequence) -> torch.Tensor:
        return torch.where(side.learned_T, side.ids_T, -100)[None]

    def offsets(side: Sequence) -> torch.Tensor:
        return torch.stack([side.starts_T, side.ends_T], -1)[None]

    return loss(
        student.logits_TV[None],
        teacher.logits_TV[None],
        labels(student),
        labels(teacher),
        student.ids_T[None],
        teacher.ids_T[None],
        student_byte_offsets=offsets(student),
        teacher_byte_offsets=offsets(teacher),
    )
