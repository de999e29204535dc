"""Request bodies. An unknown key is refused by name: ignoring it would return something else than
requested. Keys that clients always send are accepted with the value that changes nothing, and keys
that never change an answer (`metadata`, `service_tier`) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from persea.chat.family import Family
from persea.chat.messages import Conversation, Role, ThinkingEffort
from persea.data.openai_messages import parse_messages, parse_tools
from persea.errors import DataError
from persea.serve.constrained import ANY_OBJECT
from persea.teachers.engines import Sampling

TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(max_length=1 << 20)]
# Fields that may be sent with the value that changes nothing.
ZeroPenalty: TypeAlias = Annotated[float, Field(ge=0, le=0)]
UnitPenalty: TypeAlias = Annotated[float, Field(ge=1, le=1)]
# Texts before which an answer ends.
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts: TypeAlias = StopText | Annotated[list[StopText], Field(max_length=64)]
MAX_CHOICES = 64  # prompts of a request, times `n`


class StrictRequestModel(BaseModel):
    """Base of all request bodies: no unknown keys, no type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SamplingFields(StrictRequestModel):
    """How tokens are sampled. The default temperature is 0: the most likely token."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 62)
    top_k: Literal[0, -1] | None = None
    min_p: ZeroPenalty | None = None
    repetition_penalty: UnitPenalty | None = None
    presence_penalty: ZeroPenalty | None = None
    frequency_penalty: ZeroPenalty | None = None

    @property
    def sampling(self) -> Sampling:
        """The sampling settings."""
        return Sampling(
            self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed or 0
        )


class StreamOptions(StrictRequestModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class OpenAIRequest(SamplingFields):
    """Fields of both OpenAI routes."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopTexts | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Any] | None = Field(default=None, max_length=0)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(OpenAIRequest):
    """/v1/completions, with vLLM's token ids and prompt log-probabilities. A text prompt gets no
    BOS.
    """

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(max_length=MAX_CHOICES)]
    )
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    stop_token_ids: TokenIds | None = None
    add_special_tokens: Literal[False] | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0] if self.prompt else 0
        return [self.prompt] if isinstance(first, int) else self.prompt  # type: ignore[list-item,return-value]


class TokenizeRequest(StrictRequestModel):
    """/tokenize, as vLLM has it, for a text. Like the other routes it adds no BOS."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenParams(SamplingFields):
    """The supported part of vLLM's sampling_params."""

    max_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    detokenize: bool = True
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
    """One part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(StrictRequestModel):
    """Name and JSON arguments of a tool call."""

    name: str
    arguments: str = "{}"


class ChatToolCall(StrictRequestModel):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(StrictRequestModel):
    """One message; fields of an answer are accepted when a client sends it back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ChatToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None


class FunctionDefinition(StrictRequestModel):
    """A tool with its JSON schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default={})
    strict: bool | None = None


class ToolDefinition(StrictRequestModel):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(StrictRequestModel):
    """A JSON schema with a name."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictRequestModel):
    """Form of an answer: text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def answer_schema(self) -> Mapping[str, Any] | None:
        """Schema of the answer; None for text.

        Raises:
            DataError: The schema is missing.
        """
        if self.type == "json_object":
            return ANY_OBJECT
        if self.type == "json_schema" and self.json_schema is None:
            raise DataError(
                "json_schema is missing",
                where="response_format",
                remedy="send json_schema: {name, schema}",
            )
        return self.json_schema.schema_ if self.json_schema else None


class ChatTemplateKwargs(StrictRequestModel):
    """Arguments of the chat template."""

    enable_thinking: bool | None = None


class ChatCompletionRequest(OpenAIRequest):
    """/v1/chat/completions. Of keys that this server cannot obey, the values that change nothing
    are accepted.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[ToolDefinition] | None = Field(default=None, max_length=1000)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1)
    verbosity: Literal["medium"] | None = None
    functions: list[Any] | None = Field(default=None, max_length=0)
    function_call: Literal["none"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None

    def to_conversation(self, family: Family) -> Conversation:
        """Convert the request to a conversation.

        Raises:
            DataError: Tool calls of the wrong role, results without a call, malformed JSON, or an
                effort that the model lacks.
        """
        rows = [message.model_dump(exclude_none=True) for message in self.messages]
        messages = parse_messages(rows, "messages", refuse_stray_marks=False)
        if messages[-1].role is Role.ASSISTANT:
            raise DataError(
                "the last message is the assistant's own",
                where="messages",
                remedy="end with a question or a tool's result",
            )
        functions = [] if self.tool_choice == "none" else [t.function for t in self.tools or ()]
        tools = [
            # As text, parameters are taken as they are; objects of data sets lose their nulls.
            f.model_dump() | {"parameters": json.dumps(f.parameters)}
            for f in functions
        ]
        return Conversation(messages, self.resolve_effort(family), parse_tools(tools, "tools"))

    def resolve_effort(self, family: Family) -> ThinkingEffort:
        """Return the thinking effort that both switches request.

        Raises:
            DataError: The switches contradict each other, or the model lacks the effort.
        """
        requested = None
        if self.reasoning_effort == "minimal":
            requested = ThinkingEffort.LOW
        elif self.reasoning_effort is not None:
            requested = ThinkingEffort(self.reasoning_effort)
        switch = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        if None not in (switch, requested) and switch is (requested is ThinkingEffort.NONE):
            raise DataError(
                f"thinking is {'on' if switch else 'off'}, the effort is {requested}",
                where="reasoning_effort",
                remedy="send one of the two",
            )
        thinking_efforts = [e for e in family.efforts if e is not ThinkingEffort.NONE]
        if requested is ThinkingEffort.NONE or switch is False:
            if ThinkingEffort.NONE not in family.efforts:
                raise DataError(
                    "this model always thinks",
                    where="reasoning_effort",
                    remedy=f"one of {', '.join(thinking_efforts)}",
                )
            return ThinkingEffort.NONE
        if (requested is not None or switch) and not thinking_efforts:
            raise DataError(
                "this model does not think",
                where="reasoning_effort",
                remedy="leave it out, or send none",
            )
        if requested is None:
            return thinking_efforts[-1] if switch else ThinkingEffort.NONE
        if requested not in thinking_efforts:
            raise DataError(
                f"this model has no {requested.value} effort",
                where="reasoning_effort",
                remedy=f"one of {', '.join(family.efforts)}",
            )
        return requested
