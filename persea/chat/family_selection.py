"""Choose the family of a model: a candidate that is proven, else an inferred one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from persea.chat.families import candidate_families, get_families
from persea.chat.families.generic import GENERIC_FAMILY_NAME, infer_family
from persea.chat.families.generic_tools import infer_tools
from persea.chat.families.hybrid import has_thinking_switch, make_hybrid_family
from persea.chat.family import Family
from persea.chat.probing import EncodeText, probing_conversations, prove_family_once
from persea.chat.renderer import ChatRenderer
from persea.chat.template_probes import REMEDY
from persea.chat.text_runs import refuse_tokens_without_row, split_runs
from persea.errors import DataError
from persea.tokenization.logit_rows import tokens_without_row
from persea.tokenization.name_pattern import compile_names

# Conversations with tools that a notation may refuse, at two efforts.
MAX_REFUSED_WITH_TOOLS = 2


def choose_family(
    renderer: ChatRenderer,
    name: str,
    encode: EncodeText,
    eos_tokens: Callable[[], Collection[str]],
    where: str,
    response_template: object = None,
) -> ChatRenderer:
    """Return the renderer with its family.

    Args:
        renderer: Tokenizer and chat template; its family is replaced.
        name: The family that the recipe names; "" = any.
        encode: Text with control tokens -> ids, as transformers' tokenizer encodes a rendering.
        eos_tokens: Returns the control tokens that the model's own configuration declares as end
            of text; called for a generic family only.
        where: The place for error messages.
        response_template: How transformers parses the model's answers, if its tokenizer states it.

    Raises:
        DataError: The named family is not the model's, or persea cannot follow the template.
    """
    _refuse_tokens_without_row(renderer)
    has_switch = has_thinking_switch(renderer.template)

    def adapt(family: Family) -> Family:
        if has_switch and len(family.efforts) == 1:
            return make_hybrid_family(family, renderer.vocabulary)
        return family

    candidates = [replace(renderer, family=adapt(family)) for family in _candidates(renderer, name)]
    proven, difference = _choose_proven(candidates, encode)
    if proven is not None:
        return proven
    if name not in ("", GENERIC_FAMILY_NAME):
        raise DataError(
            f"this model is not of the family {name}: {difference}",
            where=where,
            remedy="delete `family:`, then persea finds out what the chat template does",
        )
    inferred = infer_family(
        renderer.vocabulary,
        renderer.template,
        renderer.template_text,
        eos_tokens(),
        where,
        with_thinking=not has_switch,
    )
    without_tools = replace(
        renderer, family=adapt(inferred.to_family()), template=inferred.template
    )
    proof = prove_family_once(without_tools, encode)
    if proof.difference:
        raise DataError(
            f"persea cannot follow the chat template: {proof.difference}",
            where=where,
            remedy=REMEDY,
        )
    if has_switch:
        return without_tools
    best, best_refused = without_tools, proof.num_refused + MAX_REFUSED_WITH_TOOLS + 1
    for known in infer_tools(
        inferred, renderer.template, renderer.template_text, response_template
    ):
        with_tools = replace(without_tools, family=known.to_family(), template=known.template)
        again = prove_family_once(with_tools, encode)
        if not again.difference and again.num_refused < best_refused:
            best, best_refused = with_tools, again.num_refused
        if best_refused <= proof.num_refused:
            break
    return best


def _choose_proven(
    candidates: list[ChatRenderer], encode: EncodeText
) -> tuple[ChatRenderer | None, str]:
    """Return (the first proven candidate, why none is proven).

    A later candidate is taken if it renders probing conversations that the first leaves out.
    """
    best: ChatRenderer | None = None
    difference, num_probes, fewest = "", 0, 0
    for candidate in candidates:
        proof = prove_family_once(candidate, encode)
        if not proof.is_proven:
            difference = difference or proof.difference or "most probing conversations are refused"
            continue
        total = sum(1 for _ in probing_conversations(candidate.family))
        num_left_out = total - proof.num_probes + proof.num_refused
        if best is None or (total >= num_probes and num_left_out < fewest):
            best, num_probes, fewest = candidate, total, num_left_out
        if not fewest:
            break
    return best, difference


def _refuse_tokens_without_row(renderer: ChatRenderer) -> None:
    """Refuse a template that writes control tokens for which the model has no logits."""
    vocabulary = renderer.vocabulary
    if not tokens_without_row(vocabulary):
        return
    messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    text = renderer.template(messages, add_generation_prompt=False)
    pattern = compile_names(vocabulary.control_token_ids)
    refuse_tokens_without_row(vocabulary, list(split_runs(vocabulary, pattern, [(text, None)])))


def _candidates(renderer: ChatRenderer, name: str) -> tuple[Family, ...]:
    if not name:
        return candidate_families(renderer.vocabulary, renderer.template_text)
    return () if name == GENERIC_FAMILY_NAME else get_families(name)
