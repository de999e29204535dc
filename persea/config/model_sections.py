"""Recipe sections of models: the student, its teachers, and the servers that run teachers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from persea.chat.documents import TEXT_FAMILY_NAME
from persea.chat.families import FAMILIES
from persea.chat.messages import ThinkingEffort
from persea.config.generation_section import GenerationSection
from persea.config.section import (
    BY_SIZE,
    MAX_COUNT,
    NAME_PATTERN,
    SLUG_PATTERN,
    RecipeSection,
    check_contradictions,
)

SERVER_PATTERN = r"^https?://[^/@\s]+(/[^@\s]*)?$"
TEXT_ONLY_MODEL = "text_only"  # `model:` of a teacher behind a chat route with unknown tokenizer

if TYPE_CHECKING:
    FamilyName: TypeAlias = str
else:  # derived from the list of families, so that a new family needs no line here
    # "generic" is GENERIC_FAMILY_NAME, whose module imports jinja2: a recipe is read without it
    FamilyName = Literal[("", *(f.name for f in FAMILIES), "generic", TEXT_FAMILY_NAME)]


class RandomModelSection(RecipeSection):
    """Size of a randomly initialised model."""

    hidden: int = Field(
        default=128, ge=8, le=8192, description="hidden size, a multiple of twice the heads"
    )
    layers: int = Field(default=3, ge=1, le=128, description="number of layers")
    heads: int = Field(default=4, ge=1, le=128, description="attention heads of a layer")
    experts: int = Field(default=4, ge=2, le=256, description="experts of a layer (gpt-oss only)")
    seed: int = Field(default=0, ge=0, le=MAX_COUNT, description="seed of the random weights")

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        step = 2 * self.heads  # rotary embeddings rotate pairs of components
        odd = self.hidden % step > 0
        return check_contradictions(
            self,
            (
                odd,
                ("hidden",),
                f"{self.hidden} is not {self.heads} heads of even width",
                f"a multiple of {step}",
            ),
        )


class ModelRef(RecipeSection):
    """Where a model comes from: the keys that student and teachers share."""

    model: str = Field(
        min_length=1,
        description="a folder in Hugging Face form, a GGUF file or a folder that holds one, a hub "
        "id such as Qwen/Qwen3-8B, random, or text_only",
    )
    revision: str = Field(default="", description="revision of a hub model: branch, tag or commit")
    tokenizer: str = Field(
        default="",
        description="folder or hub id of the tokenizer, if it is not in the model's folder or GGUF "
        "file",
    )
    family: FamilyName = Field(
        default="",
        description="chat family; empty = recognised from the model's folder; text = no chat "
        "template: the model scores and learns plain text",
    )
    chat_template: str = Field(
        default="",
        description="a .jinja file with the chat template of a model that has none, or instead of "
        "its own",
    )
    attn_implementation: str = Field(
        default="",
        pattern=r"^([a-z][a-z0-9_]*)?$",
        description="attention of transformers: eager, sdpa, flash_attention_2, flex_attention; "
        "empty = its choice",
    )
    sizes: RandomModelSection | None = Field(
        default=None, description="size of the weights of `model: random`"
    )
    licence: str = Field(
        default="",
        max_length=200,
        description="its licence, an SPDX id or expression or a name from docs/licences.md, if the "
        "model's own card or folder does not state it; both count if both state one",
    )

    @model_validator(mode="after")
    def _check_model_source(self) -> Self:
        is_random, is_local = self.model == "random", self.model.startswith((".", "/", "~"))
        return check_contradictions(
            self,
            (
                bool(self.chat_template) and self.family == TEXT_FAMILY_NAME,
                ("chat_template",),
                "given, but `family` is text",
                "delete one of the two",
            ),
            (
                self.model == TEXT_ONLY_MODEL
                and bool(
                    self.tokenizer
                    or self.revision
                    or self.family
                    or self.sizes
                    or self.chat_template
                ),
                ("model",),
                "text_only, together with a tokenizer, revision, family, chat template or sizes",
                "delete them, or name the model they belong to",
            ),
            (
                is_random and not self.tokenizer,
                ("tokenizer",),
                "missing; random weights have no tokenizer of their own",
                "add `tokenizer:`, a folder or hub id",
            ),
            (
                is_random and not self.sizes,
                ("sizes",),
                "missing; random weights need a size",
                "add `sizes: {hidden: 32, layers: 1, heads: 2}`",
            ),
            (
                not is_random and self.model != TEXT_ONLY_MODEL and bool(self.sizes),
                ("sizes",),
                "given, but this model has a size of its own",
                "delete `sizes:`, or write `model: random`",
            ),
            (
                bool(self.revision) and (is_random or is_local),
                ("revision",),
                "given, but only a hub model has one",
                "delete `revision:`",
            ),
        )


class LoraSection(RecipeSection):
    """Shape of the LoRA adapters."""

    rank: int = Field(default=16, ge=1, le=1024, description="rank of the added matrices")
    alpha: float = Field(
        default=32,
        gt=0,
        le=4096,
        description="scale of the added matrices: they are multiplied by alpha / rank",
    )
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj"),
        min_length=1,
        description="names of the adapted matrices; [all-linear] = every linear layer but the head",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the added matrices")
    use_rslora: bool = Field(
        default=False, description="multiply the added matrices by alpha / sqrt(rank) instead"
    )
    use_dora: bool = Field(
        default=False, description="learn the magnitude of each weight's columns apart (DoRA)"
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        default="none",
        description="bits of the frozen weights in the training (QLoRA); needs a CUDA GPU and "
        "bitsandbytes. The adapters are merged into the weights as they are stored",
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(), description="names of modules that are trained whole beside the adapters"
    )


class StudentSection(ModelRef):
    """The model that is trained."""

    thinking: bool = Field(
        default=False,
        description="give a model whose template has no thinking switch the hybrid template: it "
        "learns to think or to answer at once, as the prompt demands",
    )
    adapt: Literal["full", "lora"] = Field(
        default="full",
        description="full = train every weight; lora = train low-rank matrices added to them",
        json_schema_extra=BY_SIZE,
    )
    lora: LoraSection | None = Field(
        default_factory=lambda seen: LoraSection() if seen["adapt"] == "lora" else None,
        description="shape of the added matrices; only with `adapt: lora`",
    )

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        return check_contradictions(
            self,
            (
                self.adapt == "full" and self.lora is not None,
                ("lora",),
                "given, but `adapt` is full",
                "write `adapt: lora`, or delete `lora:`",
            ),
        )


class EndpointSection(RecipeSection):
    """A server that runs a teacher. It never holds a key, only the variable's name that does."""

    url: str = Field(
        default="",
        pattern=rf"^$|{SERVER_PATTERN}",
        description="address of the server: http://127.0.0.1:8000; a /v1 at its end may stay",
    )
    urls: tuple[Annotated[str, Field(pattern=SERVER_PATTERN)], ...] = Field(
        default=(),
        max_length=1024,
        description="instead of `url`: addresses of several servers of the same model; requests go "
        "to the one with the least load, and a server that brings no tokens is left for a while",
    )
    protocol: str = Field(
        default="tokens",
        pattern=SLUG_PATTERN,
        description="tokens = vLLM's and persea's token route; completions = with echo and token "
        "ids; sglang; chat = text without log-probabilities",
    )
    served_model_name: str = Field(
        default="",
        description="name of the model on the server; empty = the server has only one",
    )
    key_env: str = Field(
        default="",
        pattern=r"^([A-Z_][A-Z0-9_]*)?$",
        description="environment variable that holds the key; empty = no key",
    )
    top_logprobs: int | None = Field(
        default_factory=lambda seen: None if seen["protocol"] == "chat" else 20,
        ge=1,
        le=1024,
        validate_default=True,
        description="likeliest tokens that the server returns at each position; the mass of the "
        "others is stored as one rest",
    )
    send_effort: bool | None = Field(
        default_factory=lambda seen: False if seen["protocol"] == "chat" else None,
        validate_default=True,
        description="send the thinking effort as reasoning_effort and enable_thinking; false = "
        "the server sets it, and a model that thinks although `effort` is none is asked not to; "
        "only with `protocol: chat`",
    )
    concurrency: int = Field(
        default=8, ge=1, le=1024, description="requests at once, of each server"
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        le=100,
        description="attempts of one request before its prompt is left out",
    )
    stall_timeout_s: float = Field(
        default=60,
        gt=0,
        le=86400,
        description="seconds without a token after which a request is cancelled and repeated",
    )
    max_answer_s: float = Field(
        default=3600,
        gt=0,
        le=86400,
        description="seconds that one answer may take in all, however steadily tokens come",
    )
    give_up_after_s: float = Field(
        default=600,
        gt=0,
        le=86400,
        description="seconds without any answer after which the run stops using the server; while "
        "it restarts or is too busy, requests wait so long",
    )
    max_total_tokens: int = Field(
        default=0,
        ge=0,
        description="tokens, sent and received, after which the run stops with a message; 0 = no "
        "limit",
    )
    max_failed_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of failed requests, from 20 requests on, above which the run stops",
    )
    max_fingerprint_drift: float = Field(
        default=0.1,
        ge=0,
        description="mean difference in nats, over the log-probabilities of the handshake, above "
        "which the server is taken to run another model",
    )

    @property
    def addresses(self) -> tuple[str, ...]:
        """The servers' base URLs, without the /v1 that OpenAI's clients are given."""
        return tuple(u.rstrip("/").removesuffix("/v1") for u in self.urls or (self.url,))

    @model_validator(mode="after")
    def _check_addresses(self) -> Self:
        return check_contradictions(
            self,
            (
                not self.url and not self.urls,
                ("url",),
                "missing",
                "add `url: http://host:port`, or `urls:` of several servers",
            ),
            (
                bool(self.url) and bool(self.urls),
                ("urls",),
                "given beside `url:`",
                "put every address in `urls:`, and delete `url:`",
            ),
            (
                len(set(self.addresses)) < len(self.addresses),
                ("urls",),
                "an address is there twice",
                "delete one of them",
            ),
        )

    @model_validator(mode="after")
    def _check_protocol(self) -> Self:
        chat = self.protocol == "chat"
        return check_contradictions(
            self,
            (
                chat and self.top_logprobs is not None,
                ("top_logprobs",),
                "given, but a chat route returns no log-probabilities of a given text",
                "delete `top_logprobs:`",
            ),
            (
                not chat and self.send_effort is not None,
                ("send_effort",),
                f"given, but `protocol` is {self.protocol}",
                "delete `send_effort:`; the chat template contains the effort",
            ),
        )


class TeacherSection(ModelRef):
    """A model that the student learns from, or a reference model that is only measured."""

    name: str = Field(
        default_factory=lambda seen: (
            ""
            if seen["model"] in ("random", TEXT_ONLY_MODEL)
            else seen["model"].rstrip("/").rpartition("/")[2]
        ),
        pattern=NAME_PATTERN,
        description="name in reports: letters, digits and ._- (default: the last part of `model`)",
    )
    effort: ThinkingEffort = Field(
        default=ThinkingEffort.NONE, description="how long it thinks before it answers"
    )
    quantize: Literal["none", "8bit", "4bit", "mxfp4"] = Field(
        default="none",
        description="load its weights in fewer bits, on a GPU (8bit, 4bit: bitsandbytes; mxfp4: "
        "gpt-oss as it is published)",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="type of its weights and matrix products: auto = float32 on a CPU, as the "
        "weights are stored on a GPU",
    )
    offload: bool = Field(
        default=False,
        description="keep the layers that do not fit on the GPU in main memory; slow, and without "
        "use on a CPU",
    )
    engine: str = Field(
        default="local",
        pattern=SLUG_PATTERN,
        description="library that runs its weights on this machine",
    )
    engine_options: dict[str, str | int | float | bool] = Field(
        default={},
        description="further arguments of that library, such as {dtype: float32, max_model_len: "
        "4096, tensor_parallel_size: 2} for vllm.LLM; its max_logprobs is the number of tokens "
        "listed per position, -1 the whole vocabulary",
    )
    endpoint: EndpointSection | None = Field(
        default=None, description="a server that runs it; then no weights are loaded here"
    )
    generation: GenerationSection = Field(
        default=GenerationSection(), description="how it generates, if not as the others do"
    )
    reference: bool = Field(
        default=False,
        description="reference model: evaluated like the student, never teaches",
    )

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        is_random = self.model == "random"
        remote = self.endpoint is not None or self.engine != "local"
        placed = [
            key
            for key, is_set in (
                ("quantize", self.quantize != "none"),
                ("precision", self.precision != "auto"),
                ("offload", self.offload),
            )
            if is_set
        ]
        return check_contradictions(
            self,
            (
                remote and bool(placed),
                tuple(placed[:1]),
                "given, but persea does not load these weights",
                "set it where the server is started, or in `engine_options:`",
            ),
            (
                bool(self.engine_options) and self.engine == "local",
                ("engine_options",),
                "given, but persea itself runs these weights"
                if self.endpoint is None
                else "given, but a server runs these weights",
                "name an `engine:`, or delete `engine_options:`",
            ),
            (
                is_random and self.quantize != "none",
                ("quantize",),
                "given, but these are random weights",
                "delete `quantize:`",
            ),
            (
                self.quantize != "none" and self.precision != "auto",
                ("precision",),
                f"given, but `quantize: {self.quantize}` decides the type",
                "delete one of the two",
            ),
            (
                is_random and self.precision != "auto",
                ("precision",),
                "given, but these are random weights",
                "delete `precision:`",
            ),
            (
                is_random and self.offload,
                ("offload",),
                "given, but these are random weights",
                "delete `offload:`",
            ),
        )

    @model_validator(mode="after")
    def _check_name_and_endpoint(self) -> Self:
        # pydantic checks the pattern of a written name, not of the default taken from `model`
        nameless = not re.fullmatch(NAME_PATTERN, self.name)
        chat = self.endpoint is not None and self.endpoint.protocol == "chat"
        return check_contradictions(
            self,
            (
                nameless,
                ("name",),
                f"missing; `model: {self.model}` gives none",
                "add `name:`, letters, digits and ._-",
            ),
            (
                self.model == TEXT_ONLY_MODEL and not chat,
                ("model",),
                "text_only, but no chat route",
                "add `endpoint: {url: ..., protocol: chat}`",
            ),
            (
                self.endpoint is not None and self.model == "random",
                ("endpoint",),
                "given, but random weights run on this machine",
                "delete `endpoint:`",
            ),
            (
                self.endpoint is not None and self.engine != "local",
                ("engine",),
                f"{self.engine}, but an endpoint runs it",
                "delete `engine:`",
            ),
        )
