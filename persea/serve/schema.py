"""What a request may say. A key that is not here is refused by name: a server that drops what it does not know lies."""

from __future__ import annotations

import json
import unicodedata
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from persea.chat.family import Family
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
    canonical_json,
)
from persea.errors import DataError
from persea.teachers.engines import Sampling

TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(max_length=1 << 20)]
ZeroPenalty: TypeAlias = Annotated[
    float, Field(ge=0, le=0)
]  # a penalty that may be named, and must be none


class StrictRequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SamplingFields(StrictRequestModel):
    """How tokens are drawn. temperature 0, the default here, takes the likeliest."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 62)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed or 0
        )


class StreamOptions(StrictRequestModel):
    include_usage: bool = False


class OpenAIRequest(SamplingFields):
    """What chat and completions share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None
    presence_penalty: ZeroPenalty | None = None
    frequency_penalty: ZeroPenalty | None = None


class CompletionRequest(OpenAIRequest):
    """/v1/completions, with vLLM's ids and prompt log-probabilities. A text prompt gets no BOS."""

    prompt: str | TokenIds
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    add_special_tokens: Literal[False] | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False


class TokenParams(SamplingFields):
    """vLLM's sampling_params, as far as they are known here."""

    max_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    detokenize: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0)
    prompt_logprob_token_ids: list[list[Annotated[int, Field(ge=-1, lt=1 << 31)]]] | None = Field(
        default=None, max_length=1 << 20
    )
    prompt_logprob_start: int | None = Field(default=None, ge=0)


class TokenRequest(StrictRequestModel):
    """/inference/v1/generate."""

    model: str | None = None
    token_ids: Annotated[TokenIds, Field(min_length=1)]
    sampling_params: TokenParams = TokenParams()
    return_token_ids: bool = False
    stream: bool = False
    request_id: str | None = Field(default=None, max_length=200)


class TextContentPart(StrictRequestModel):
    type: Literal["text"]
    text: str


class FunctionCall(StrictRequestModel):
    name: str
    arguments: str = "{}"


class ChatToolCall(StrictRequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(StrictRequestModel):
    """One message; what a client sends back of an answer is accepted with it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(p.text for p in self.content or ())
        )


class FunctionDefinition(StrictRequestModel):
    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default={})
    strict: bool | None = None


class ToolDefinition(StrictRequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class ChatTemplateKwargs(StrictRequestModel):
    enable_thinking: bool | None = None


class ChatCompletionRequest(OpenAIRequest):
    """/v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[ToolDefinition] | None = Field(default=None, max_length=1000)
    tool_choice: Literal["auto", "none"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None

    def to_conversation(self, family: Family) -> Conversation:
        """Raises DataError for messages that no conversation holds: calls of the wrong role, results of no call, broken JSON."""
        messages: list[Message] = []
        names: dict[str, str] = {}
        for k, said in enumerate(self.messages):
            parts = _message_parts(said, names, f"messages.{k}")
            role = Role.SYSTEM if said.role == "developer" else Role(said.role)
            if role is Role.TOOL and messages and messages[-1].role is Role.TOOL:
                messages[-1] = Message(role, (*messages[-1].parts, *parts))
            else:
                messages.append(Message(role, parts))
        if messages[-1].role is Role.ASSISTANT:
            raise DataError(
                "the last message is the assistant's own",
                where="messages",
                remedy="end with a question or a tool's result",
            )
        try:
            tools = (
                ()
                if self.tool_choice == "none"
                else tuple(
                    Tool(
                        t.function.name,
                        t.function.description,
                        canonical_json(json.dumps(t.function.parameters)),
                    )
                    for t in self.tools or ()
                )
            )
        except (
            ValueError,
            RecursionError,
        ) as problem:  # NaN, half a surrogate pair, a thousand brackets: JSON to Python, and to no template
            raise DataError(
                "a tool's parameters are no plain JSON", where="tools", remedy="send a JSON schema"
            ) from problem
        return Conversation(tuple(messages), self.resolve_effort(family), tools)

    def resolve_effort(self, family: Family) -> ThinkingEffort:
        """What both switches ask for. Raises DataError where they contradict each other, or this model cannot."""
        asked = (
            None
            if self.reasoning_effort is None
            else ThinkingEffort.LOW
            if self.reasoning_effort == "minimal"
            else ThinkingEffort(self.reasoning_effort)
        )
        switch = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        if switch is not None and asked is not None and switch is (asked is ThinkingEffort.NONE):
            raise DataError(
                f"thinking is {'on' if switch else 'off'}, the effort is {asked.value}",
                where="reasoning_effort",
                remedy="send one of the two",
            )
        silent = asked is ThinkingEffort.NONE or switch is False
        thinks = [e for e in family.efforts if e is not ThinkingEffort.NONE]
        if silent and ThinkingEffort.NONE not in family.efforts:
            raise DataError(
                "this model always thinks",
                where="reasoning_effort",
                remedy=f"one of {', '.join(thinks)}",
            )
        if (asked is not None or switch) and not silent and not thinks:
            raise DataError(
                "this model does not think",
                where="reasoning_effort",
                remedy="leave it out, or send none",
            )
        if asked is None:
            return thinks[-1] if switch else ThinkingEffort.NONE
        if asked not in (ThinkingEffort.NONE, *thinks):
            raise DataError(
                f"this model knows no {asked.value} effort",
                where="reasoning_effort",
                remedy=f"one of {', '.join(family.efforts)}",
            )
        return asked


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _message_parts(
    message: ChatMessage, tool_names_by_call_id: dict[str, str], where: str
) -> tuple[ContentPart, ...]:
    """Parts of one message. names: id of a call -> its tool, filled on the way."""
    if message.role != "assistant" and (message.tool_calls or message.reasoning_content):
        raise DataError(
            "only the assistant thinks and calls",
            where=where,
            remedy="move it into an assistant's message",
        )
    if message.role == "tool":
        name = tool_names_by_call_id.get(message.tool_call_id or "", message.name or "")
        if not name:
            raise DataError(
                f"a result of no call: {message.tool_call_id!r}",
                where=where,
                remedy="give the id of a call before it",
            )
        return (ToolResult(name, _nfc(message.text)),)
    parts: list[ContentPart] = (
        [Thinking(_nfc(message.reasoning_content))] if message.reasoning_content else []
    )
    if message.text or not message.tool_calls:
        parts.append(Text(_nfc(message.text)))
    for call in message.tool_calls or ():
        tool_names_by_call_id[call.id] = call.function.name
        read = ToolCall.from_generated(call.function.name, call.function.arguments)
        if read is None:
            raise DataError(
                f"a broken call of {call.function.name[:40]!r}",
                where=where,
                remedy="arguments are one JSON object, as text",
            )
        parts.append(read)
    return tuple(parts)
