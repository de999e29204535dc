"""The sections of a recipe: what each key is called, what it may be, what it means, and which contradict each other."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from persea.chat.families import FAMILIES
from persea.chat.families.generic import GENERIC_FAMILY_NAME as GENERIC
from persea.chat.messages import ThinkingEffort
from persea.config.yaml_source import KeyPath

SLUG_PATTERN, NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$", r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAX_COUNT = 1 << 30  # no count in a recipe is larger
TEXT_ONLY_MODEL = "words"  # model of a teacher whose tokenizer nobody knows here
SectionT = TypeVar("SectionT", bound="RecipeSection")


class LRSchedule(StrEnum):
    """COSINE: half a cosine from the highest rate to the floor. WSD: warm up, stay, then fall in a line (Hu et al. 2024, MiniCPM), so that a
    run can be made longer without beginning anew: only its last stretch depends on how many steps there are.
    """

    COSINE = "cosine"
    WSD = "wsd"


class LossBalancing(StrEnum):
    """none: every position counts alike. deviation: by the scale of its group's losses."""

    NONE = "none"
    DEVIATION = "deviation"


class RecipeSection(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def check_contradictions(
    section: SectionT, *contradictions: tuple[bool, KeyPath, str, str]
) -> SectionT:
    """The section, or all its contradictions at once; a claim is (does it hold, key, what, remedy)."""
    found = [claim[1:] for claim in contradictions if claim[0]]
    if found:
        raise PydanticCustomError("contradiction", "contradiction", {"found": found})
    return section


class RandomModelSection(RecipeSection):
    hidden: int = Field(
        default=128, ge=8, le=8192, description="width of the model, a multiple of twice the heads"
    )
    layers: int = Field(default=3, ge=1, le=128, description="number of layers")
    heads: int = Field(default=4, ge=1, le=128, description="attention heads of a layer")
    experts: int = Field(default=4, ge=2, le=256, description="experts of a layer (gpt-oss only)")
    seed: int = Field(default=0, ge=0, le=MAX_COUNT, description="seed of the random weights")

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        step = 2 * self.heads  # rotary positions turn pairs of numbers
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


if TYPE_CHECKING:
    FamilyName: TypeAlias = str
else:
    FamilyName = Literal[
        ("", *(f.name for f in FAMILIES), GENERIC)
    ]  # a new family is one line there, none here


class ModelRef(RecipeSection):
    """Where a model comes from: what student and teachers share."""

    model: str = Field(
        min_length=1,
        description="a folder in Hugging Face form, a hub id such as Qwen/Qwen3-8B, random, or words",
    )
    revision: str = Field(default="", description="revision of a hub model: branch, tag or commit")
    tokenizer: str = Field(
        default="", description="folder or hub id of the tokenizer where it is not the model's own"
    )
    family: FamilyName = Field(default="", description="chat family; empty = recognised")
    sizes: RandomModelSection | None = Field(
        default=None, description="size of the weights of `model: random`"
    )

    @model_validator(mode="after")
    def _check_model_source(self) -> Self:
        made, local = self.model == "random", self.model.startswith((".", "/", "~"))
        return check_contradictions(
            self,
            (
                self.model == TEXT_ONLY_MODEL
                and bool(self.tokenizer or self.revision or self.family or self.sizes),
                ("model",),
                "words, and a tokenizer, revision, family or sizes beside it",
                "delete them, or name the model they belong to",
            ),
            (
                made and not self.tokenizer,
                ("tokenizer",),
                "missing; random weights bring none",
                "add `tokenizer:`, a folder or hub id",
            ),
            (
                made and not self.sizes,
                ("sizes",),
                "missing; random weights need a size",
                "add `sizes: {hidden: 32, layers: 1, heads: 2}`",
            ),
            (
                not made and self.model != TEXT_ONLY_MODEL and bool(self.sizes),
                ("sizes",),
                "given, but this model has its own",
                "delete `sizes:`, or write `model: random`",
            ),
            (
                bool(self.revision) and (made or local),
                ("revision",),
                "given, but only a hub model has one",
                "delete `revision:`",
            ),
        )


class LoraSection(RecipeSection):
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the added matrices")
    alpha: float = Field(
        default=32,
        gt=0,
        le=4096,
        description="strength of the added matrices: they are scaled by alpha / rank",
    )
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj"),
        min_length=1,
        description="names of the adapted matrices",
    )


class StudentSection(ModelRef):
    thinking: bool = Field(
        default=False,
        description="give a model whose template has no thinking switch the hybrid template: it learns to "
        "think or answer at once, as the prompt says",
    )
    adapt: Literal["full", "lora"] = Field(
        default="full", description="full = every weight learns; lora = small added matrices do"
    )
    lora: LoraSection | None = Field(
        default_factory=lambda seen: LoraSection() if seen["adapt"] == "lora" else None,
        description="shape of the added matrices; only with `adapt: lora`",
    )

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        idle = self.adapt == "full" and self.lora is not None
        return check_contradictions(
            self,
            (
                idle,
                ("lora",),
                "given, but `adapt` is full",
                "write `adapt: lora`, or delete `lora:`",
            ),
        )


class EndpointSection(RecipeSection):
    """A server that runs a teacher. Its key is never here, only the name of the variable that holds it."""

    url: str = Field(
        pattern=r"^https?://[^/@\s]+(/[^@\s]*)?$",
        description="where it is, without the route: http://127.0.0.1:8000",
    )
    protocol: str = Field(
        default="tokens",
        pattern=SLUG_PATTERN,
        description="tokens = vLLM's and persea's token route; completions = with echo and token ids; sglang; chat = words alone",
    )
    served: str = Field(
        default="", description="what the server calls the model; empty = it has only one"
    )
    key_env: str = Field(
        default="",
        pattern=r"^([A-Z_][A-Z0-9_]*)?$",
        description="variable of the environment that holds the key; empty = none",
    )
    top: int | None = Field(
        default_factory=lambda seen: None if seen["protocol"] == "chat" else 20,
        ge=1,
        le=1024,
        validate_default=True,
        description="tokens named at each position, exactly; the rest stays a rest",
    )
    dial: bool | None = Field(
        default_factory=lambda seen: False if seen["protocol"] == "chat" else None,
        validate_default=True,
        description="send the effort as reasoning_effort and enable_thinking; false = it has one; only with `protocol: chat`",
    )
    concurrency: int = Field(default=8, ge=1, le=1024, description="requests at once")
    attempts: int = Field(
        default=5,
        ge=1,
        le=100,
        description="attempts of one request before its prompt is set aside",
    )
    stall: float = Field(
        default=60,
        gt=0,
        le=86400,
        description="seconds without a token after which a request is broken off and made again",
    )
    patience: float = Field(
        default=600,
        gt=0,
        le=86400,
        description="seconds without any answer after which the server is given up",
    )
    budget: int = Field(
        default=0,
        ge=0,
        description="tokens, asked and said, after which a run stops and says so; 0 = no limit",
    )
    max_failed_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of failed requests, from 20 requests on, at which the server is given up",
    )
    max_fingerprint_drift: float = Field(
        default=0.1,
        ge=0,
        description="mean difference in nats, over the log-probabilities of the handshake, from which "
        "the server is taken to have another model",
    )

    @model_validator(mode="after")
    def _check_protocol(self) -> Self:
        chat = self.protocol == "chat"
        return check_contradictions(
            self,
            (
                chat and self.top is not None,
                ("top",),
                "given, but a chat route names no tokens of given words",
                "delete `top:`",
            ),
            (
                not chat and self.dial is not None,
                ("dial",),
                f"given, but `protocol` is {self.protocol}",
                "delete `dial:`; the template has it",
            ),
        )


class GenerationSection(RecipeSection):
    """How one teacher answers, where it is not as the others."""

    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="longest answer, in its own tokens, wherever it is asked",
    )
    temperature: float = Field(
        default=0, ge=0, le=10, description="0 = the likeliest token each time"
    )
    top_p: float = Field(
        default=1, gt=0, le=1, description="drawn from the likeliest tokens of this mass"
    )
    seed: int = Field(default=0, ge=0, le=MAX_COUNT, description="seed of what is drawn")

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        idle = not self.temperature and (self.top_p < 1 or self.seed > 0)
        return check_contradictions(
            self,
            (
                idle,
                ("temperature",),
                "0, so nothing is drawn",
                "give a temperature, or delete `top_p:` and `seed:`",
            ),
        )


class TeacherSection(ModelRef):
    name: str = Field(
        default_factory=lambda seen: (
            ""
            if seen["model"] in ("random", TEXT_ONLY_MODEL)
            else seen["model"].rstrip("/").rpartition("/")[2]
        ),
        pattern=NAME_PATTERN,
        description="what reports call it: letters, digits and ._- (default: the last part of `model`)",
    )
    effort: ThinkingEffort = Field(
        default=ThinkingEffort.NONE, description="how long it thinks before it answers"
    )
    licence: str = Field(
        default="", description="its licence, where you know better than the family's usual one"
    )
    quantize: Literal["none", "8bit", "4bit", "mxfp4"] = Field(
        default="none",
        description="load its weights in fewer bits, on a GPU (8bit, 4bit: bitsandbytes; mxfp4: gpt-oss as it is stored)",
    )
    offload: bool = Field(
        default=False,
        description="keep in main memory what the GPU has no room for; slow, and never needed on a CPU",
    )
    engine: str = Field(
        default="local",
        pattern=SLUG_PATTERN,
        description="runs its weights on this machine: local (transformers) or vllm",
    )
    endpoint: EndpointSection | None = Field(
        default=None, description="a server that runs it; then no weights are loaded here"
    )
    generation: GenerationSection = Field(
        default=GenerationSection(), description="how it answers, where not as the others"
    )
    yardstick: bool = Field(
        default=False,
        description="measured beside the student in the evaluation, and never teaches",
    )

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        made = self.model == "random"
        afar = self.endpoint is not None or self.engine != "local"
        placed = self.quantize != "none" or self.offload
        return check_contradictions(
            self,
            (
                afar and placed,
                ("quantize" if self.quantize != "none" else "offload",),
                "given, but persea does not load these weights",
                "tell the server instead",
            ),
            (
                made and self.quantize != "none",
                ("quantize",),
                "given, but these are random weights",
                "delete `quantize:`",
            ),
            (
                made and self.offload,
                ("offload",),
                "given, but these are random weights",
                "delete `offload:`",
            ),
        )

    @model_validator(mode="after")
    def _check_name_and_endpoint(self) -> Self:
        nameless = not re.fullmatch(
            NAME_PATTERN, self.name
        )  # pydantic checks a written name, not the one that `model` gives
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
                "words, but no chat route that says them",
                "add `endpoint: {url: ..., protocol: chat}`",
            ),
            (
                self.endpoint is not None and self.model == "random",
                ("endpoint",),
                "given, but random weights run here",
                "delete `endpoint:`",
            ),
            (
                self.endpoint is not None and self.engine != "local",
                ("engine",),
                f"{self.engine}, but an endpoint runs it",
                "delete `engine:`",
            ),
        )


class CorpusSection(RecipeSection):
    skill: str = Field(
        pattern=SLUG_PATTERN,
        description="the skill these prompts teach: languages, code, safety, reasoning or tools",
    )
    generate: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="number of prompts drawn from the skill's own generator",
    )
    file: str | None = Field(
        default=None, min_length=1, description="a .jsonl file, one prompt a line"
    )
    language: str = Field(
        default="", description="language of the file's prompts, such as vi; empty = not said"
    )
    modes: dict[ThinkingEffort, Annotated[float, Field(gt=0, le=1)]] = Field(
        default={},
        description="effort -> share of these prompts that are asked, and learned, at it, such as {none: 0.5, low: 0.2, high: 0.3}; "
        "empty = asked at the teacher's effort, learned as an answer at once",
    )
    near: float | None = Field(
        default_factory=lambda seen: 0.8 if seen.get("file") else None,
        ge=0.3,
        le=1,
        validate_default=True,
        description="share of common runs of words from which a file's prompt repeats one before it, and is left out",
    )
    broken: Literal["refuse", "quarantine"] = Field(
        default="refuse",
        description="a line that is no prompt ends the run, or is counted and left out",
    )

    @model_validator(mode="after")
    def _check_prompt_source(self) -> Self:
        made, kept = self.generate is not None, self.file is not None
        return check_contradictions(
            self,
            (
                not made and not kept,
                (),
                "neither `generate` nor `file`",
                "add `generate: 1000` or `file: prompts.jsonl`",
            ),
            (
                made and kept,
                (),
                "both `generate` and `file`",
                "keep one; two parts may teach the same skill",
            ),
            (
                bool(self.modes) and abs(sum(self.modes.values()) - 1) > 1e-6,
                ("modes",),
                f"shares that sum to {sum(self.modes.values()):g}",
                "let them sum to 1",
            ),
            (
                self.near is not None and not kept,
                ("near",),
                "given, but no `file`; a generator's questions differ by design",
                "delete `near:`",
            ),
            (
                self.broken == "quarantine" and not kept,
                ("broken",),
                "given, but no `file` that could be broken",
                "delete `broken:`",
            ),
            (
                not (self.file or ".jsonl").endswith(".jsonl"),
                ("file",),
                f"{self.file!r} is not .jsonl",
                "one JSON object a line",
            ),
        )


class AuditionSection(RecipeSection):
    items: int = Field(
        default=100,
        ge=1,
        le=MAX_COUNT,
        description="most questions of each skill; fewer where the ranking is settled sooner",
    )
    batch: int = Field(default=64, ge=1, le=MAX_COUNT, description="questions asked at once")
    floor: float = Field(
        default=0.05, ge=0, le=1, description="least score of a teacher that teaches a skill"
    )
    efforts: tuple[ThinkingEffort, ...] = Field(
        default=(),
        description="efforts to measure teachers at besides their own, where they have them",
    )
    pinned: dict[str, str] = Field(
        default={},
        description="skill -> teacher that you choose yourself, instead of by measurement",
    )


class CaptureSection(RecipeSection):
    answers: Literal["ask", "given"] = Field(
        default="ask",
        description="ask = the teachers answer; given = they score the answers that come with the prompts",
    )
    rows: Literal["sampled", "topk"] = Field(
        default="sampled",
        description="sampled = an unbiased sample of each distribution; topk = its likeliest tokens up to `kl`, and a rest",
    )
    tau: float | None = Field(
        default_factory=lambda seen: 0.02 if seen["rows"] == "sampled" else None,
        gt=0,
        le=0.5,
        validate_default=True,
        description="probability below which a token is kept by chance, so that rows stay small; only with `rows: sampled`",
    )
    kl: float | None = Field(
        default_factory=lambda seen: 0.01 if seen["rows"] == "topk" else None,
        ge=0.003,
        le=10,
        validate_default=True,
        description="nats a row may lose, its rest spread by how often tokens stand in the unit; only with `rows: topk`",
    )
    max_new_tokens: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="longest answer, in the teacher's tokens"
    )
    batch: int = Field(default=64, ge=1, le=MAX_COUNT, description="prompts asked at once")
    unit: int = Field(
        default=256,
        ge=1,
        le=MAX_COUNT,
        description="prompts saved together, fewer where they could exceed 2^20 tokens: the most that a crash can cost",
    )
    verify: bool = Field(
        default=False,
        description="teach no answer that the skill's own grader calls wrong, where the prompt brought a right one",
    )
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="stop, and say so, once this many tokens are kept; more goes on from there",
    )
    hours: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="stop, and say so, once a run has asked for this long",
    )

    @model_validator(mode="after")
    def _check_distribution_kind(self) -> Self:
        kind, key, idle = (
            ("topk", "kl", self.kl) if self.rows == "sampled" else ("sampled", "tau", self.tau)
        )
        return check_contradictions(
            self,
            (
                idle is not None,
                (key,),
                f"given, but `rows` is {self.rows}",
                f"write `rows: {kind}`, or delete `{key}:`",
            ),
            (
                self.verify and self.answers == "given",
                ("verify",),
                "true, but the answers are the given ones",
                "delete `verify:`",
            ),
        )


class OnPolicySection(RecipeSection):
    after: int = Field(
        ge=0,
        le=MAX_COUNT,
        description="steps on the teachers' answers first: a student must be able to answer before it is heard",
    )
    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the steps from then on that learn from the student's own answers",
    )
    rollouts: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="answers drawn at once; `batch` of them are used up a step",
    )
    refresh: int = Field(
        default=8,
        ge=0,
        le=MAX_COUNT,
        description="steps after which an answer is stale and refused",
    )
    max_new_tokens: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="longest answer, in the student's tokens"
    )
    temperature: float = Field(
        default=1.0, gt=0, le=2, description="of drawing; 1 is the student's own distribution"
    )
    objective: Literal["events", "chunk"] = Field(
        default="events",
        description="events = reverse KL at every common boundary; chunk = how likely both find each stretch between two",
    )
    truncated: Literal["keep", "drop"] = Field(
        default="keep",
        description="what an answer cut at `max_new_tokens` said so far is learned, or not",
    )


class TrainingSection(RecipeSection):
    """event_share and completion as docs/results.md decided them (points 5 and 7)."""

    steps: int = Field(default=1500, ge=1, le=MAX_COUNT, description="optimiser steps")
    batch: int = Field(default=16, ge=1, le=MAX_COUNT, description="conversations a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="highest learning rate")
    warmup: int = Field(
        default=50, ge=0, le=MAX_COUNT, description="steps until the highest learning rate"
    )
    event_share: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="weight of events at common boundaries; the rest is cross-entropy",
    )
    completion: bool = Field(
        default=False,
        description="let a teacher's row speak in the middle of its token too; else the text alone does",
    )
    objective: Literal["events", "sft"] = Field(
        default="events",
        description="events = the teachers' distributions and their text; sft = their text alone (supervised fine-tuning)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of matrix products; weights and the optimiser's moments are float32 in both",
    )
    recompute: bool = Field(
        default=False,
        description="make activations again in the backward pass: less memory, about a third more time",
    )
    packing: bool = Field(
        default=False,
        description="let short conversations share a row, blind to each other, instead of padding them",
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="AdamW's weight decay")
    clip: float = Field(default=1.0, gt=0, le=MAX_COUNT, description="largest norm of the gradient")
    max_tokens: int = Field(
        default=512,
        ge=8,
        le=MAX_COUNT,
        description="longest conversation, in student tokens; longer ones are left out",
    )
    checkpoint_every: int = Field(
        default=200, ge=1, le=MAX_COUNT, description="steps between checkpoints"
    )
    log_every: int = Field(
        default=10, ge=1, le=MAX_COUNT, description="steps between lines of the log"
    )
    schedule: LRSchedule = Field(
        default=LRSchedule.COSINE,
        description="how the learning rate falls: cosine, or wsd (stays, then falls in a line)",
    )
    cooldown: float | None = Field(
        default_factory=lambda seen: 0.2 if seen["schedule"] == "wsd" else None,
        gt=0,
        le=1,
        validate_default=True,
        description="share of the steps in which it falls; only with `schedule: wsd`",
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        le=MAX_COUNT,
        description="parts a batch is worked through in, one after another, to need less memory",
    )
    evaluate_every: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="steps between losses of lessons that are held out; 0 = none is",
    )
    held_out: float | None = Field(
        default_factory=lambda seen: 0.05 if seen["evaluate_every"] else None,
        gt=0,
        le=0.5,
        validate_default=True,
        description="share of the lessons held out, in whole batches; only with `evaluate_every`",
    )
    skips: int = Field(
        default=3,
        ge=0,
        le=MAX_COUNT,
        description="steps that may be left out because loss or gradient is not finite, before it ends",
    )
    balance: LossBalancing = Field(
        default=LossBalancing.NONE,
        description="what a position counts for: none = all alike; deviation = by the scale of its "
        "teacher's and skill's losses, so that none drowns the others",
    )
    report_to: Literal["tensorboard", "trackio", "wandb"] | None = Field(
        default=None, description="show the metrics there too, as they come"
    )
    on_policy: OnPolicySection | None = Field(
        default=None, description="learn from the student's own answers too; not given = never"
    )

    @model_validator(mode="after")
    def _check_unused_keys(self) -> Self:
        return check_contradictions(
            self,
            (
                self.schedule is LRSchedule.COSINE and self.cooldown is not None,
                ("cooldown",),
                "given, but `schedule` is cosine",
                "write `schedule: wsd`, or delete `cooldown:`",
            ),
            (
                not self.evaluate_every and self.held_out is not None,
                ("held_out",),
                "given, but `evaluate_every` is 0",
                "write `evaluate_every: 100`, or delete `held_out:`",
            ),
            (
                self.accumulate > self.batch,
                ("accumulate",),
                f"{self.accumulate} parts of a batch of {self.batch}",
                "at most one a conversation",
            ),
        )

    @model_validator(mode="after")
    def _check_rollout_age(self) -> Self:
        on = self.on_policy
        if on is None:
            return self
        oldest = math.ceil((on.rollouts / self.batch - 1) / on.share)
        return check_contradictions(
            self,
            (
                on.after >= self.steps,
                ("on_policy", "after"),
                f"{on.after}, but there are {self.steps} steps",
                "fewer, or more `steps`",
            ),
            (
                on.rollouts % self.batch > 0,
                ("on_policy", "rollouts"),
                f"{on.rollouts} is no multiple of `batch`, {self.batch}",
                "a multiple of it",
            ),
            (
                oldest > on.refresh,
                ("on_policy", "refresh"),
                f"{on.refresh}, but the last of {on.rollouts} answers is {oldest} steps old when used",
                "a larger `refresh`, fewer `rollouts`, or a larger `batch` or `share`",
            ),
        )

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        idle = self.objective == "sft" and self.completion
        return check_contradictions(
            self,
            (
                idle,
                ("completion",),
                "given, but `objective` is sft",
                "write `objective: events`, or delete `completion:`",
            ),
        )


class BenchmarkSection(RecipeSection):
    """One file of a published question set (docs/sets.md)."""

    set: str = Field(
        pattern=SLUG_PATTERN,
        description="which published set: gsm8k, mgsm, xcopa, ifeval ... (docs/sets.md)",
    )
    file: str | None = Field(
        default=None, min_length=1, description="its file, in the form it was published in"
    )
    answers: str | None = Field(
        default=None,
        min_length=1,
        description="the file of its answers, where they are published apart",
    )
    hub: str | None = Field(
        default=None,
        min_length=1,
        description="a hub data set such as openai/gsm8k, instead of a file",
    )
    config: str = Field(default="", description="configuration of a hub data set")
    split: str = Field(default="test", min_length=1, description="split of a hub data set")
    language: str = Field(
        default="", description="language of its answers, such as vi; empty = the set's own"
    )
    skill: str = Field(
        default="",
        description="the skill it measures, where that is not the set's own name; sets of one skill go together",
    )

    @model_validator(mode="after")
    def _check_benchmark_source(self) -> Self:
        return check_contradictions(
            self,
            (
                self.file is None and self.hub is None,
                (),
                "neither `file` nor `hub`",
                "add `file: path/to/the/set.jsonl`",
            ),
            (
                self.file is not None and self.hub is not None,
                (),
                "both `file` and `hub`",
                "keep one",
            ),
            (
                self.config != "" and self.hub is None,
                ("config",),
                "given, but no `hub`",
                "delete `config:`",
            ),
            (
                not re.fullmatch(SLUG_PATTERN, self.skill or "a"),
                ("skill",),
                f"{self.skill!r} is no plain name",
                "a-z, 0-9 and ._-",
            ),
        )


class EvaluationSection(RecipeSection):
    items: int = Field(default=200, ge=1, le=MAX_COUNT, description="questions of each skill")
    batch: int = Field(default=64, ge=1, le=MAX_COUNT, description="questions asked at once")
    max_new_tokens: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="longest answer, in the speaker's tokens"
    )
    efforts: tuple[ThinkingEffort, ...] = Field(
        default=(),
        description="efforts to measure everybody at besides their own, where they have them",
    )
    allow_regression: bool = Field(
        default=False,
        description="whether a student less safe than its base ends the run well; else exit 4",
    )
    lm_eval: dict[str, str] = Field(
        default={}, description="speaker -> a results file of lm-eval that joins the page"
    )
    judge: str = Field(
        default="",
        description="a yardstick that grades safety sets instead of rules; none of a teacher's family",
    )
    sets: tuple[BenchmarkSection, ...] = Field(
        default=(),
        description="published question sets that teachers are chosen and everybody is compared by",
    )


class CheckSection(RecipeSection):
    floor: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="least share of learned tokens on a common boundary, else refused",
    )
    disagreement: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="most common boundaries whose two tokens are different events, else refused",
    )
    texts: dict[str, str] = Field(
        default={},
        description="language -> a file to measure besides the skills' answers, one text a line; FILE#key = that key of JSON lines",
    )
    lines: int = Field(default=200, ge=1, le=MAX_COUNT, description="lines of each text, at most")
    likelihood: bool | None = Field(
        default=None,
        description="open weights, to see whether a teacher's template suits it (default: those in a folder of at most 4 GB)",
    )
