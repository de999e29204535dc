"""Names that other trainers give to recipe keys: read, each with a notice, or answered by a remedy.

A name is read where it means the same as a key of persea. Where it means something else, the
unknown key is refused with the remedy of `FOREIGN_REMEDIES`.
"""

from __future__ import annotations

from persea.config.yaml_source import KeyPath

_LICENCE = {"license": "licence"}
_LORA = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "lora_target_modules": "targets",
}
# (path of the section, "*" = every entry of a list), name elsewhere -> key of persea
FOREIGN_KEYS: dict[KeyPath, dict[str, str]] = {
    (): {"license_decisions": "licence_decisions"},
    ("student",): _LICENCE,
    ("student", "lora"): _LORA,
    ("teachers", "*"): {**_LICENCE, "reasoning_effort": "effort"},
    ("teachers", "*", "generation"): {"max_tokens": "max_new_tokens"},
    ("corpus", "*"): _LICENCE,
    ("capture",): {"max_tokens": "max_new_tokens"},
    ("training",): {
        "max_steps": "steps",
        "num_steps": "steps",
        "train_steps": "steps",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "train_batch_size": "batch_size",
        "global_batch_size": "batch_size",
        "lr": "learning_rate",
        "max_lr": "learning_rate",
        "peak_learning_rate": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "scheduler": "lr_scheduler_type",
        "num_warmup_steps": "warmup_steps",
        "logging_steps": "log_every",
        "save_steps": "checkpoint_every",
        "eval_every": "eval_steps",
        "bf16": "precision",
        "dtype": "precision",
        "grad_clip": "max_grad_norm",
        "gradient_clipping": "max_grad_norm",
        "clip_grad_norm": "max_grad_norm",
        "max_gradient_norm": "max_grad_norm",
        "grad_accum": "gradient_accumulation_steps",
        "gradient_accumulation": "gradient_accumulation_steps",
        "activation_checkpointing": "gradient_checkpointing",
        "max_seq_length": "max_length",
        "max_seq_len": "max_length",
        "sequence_len": "max_length",
        "cutoff_len": "max_length",
        "wd": "weight_decay",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "eps": "adam_epsilon",
        "adam_eps": "adam_epsilon",
        "min_lr_ratio": "min_learning_rate_ratio",
        "tracker": "report_to",
    },
    ("training", "on_policy"): {"max_completion_length": "max_new_tokens"},
    ("evaluation",): {"max_tokens": "max_new_tokens", "limit": "items"},
}
# (path of the key, written with persea's names), value elsewhere -> value here
FOREIGN_VALUES: dict[KeyPath, dict[str | bool, str]] = {
    ("training", "precision"): {
        True: "bfloat16",
        False: "float32",
        "bf16": "bfloat16",
        "fp32": "float32",
    },
    ("training", "lr_scheduler_type"): {
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd",
    },
}
# section -> name elsewhere -> remedy, where no key of persea means the same
FOREIGN_REMEDIES: dict[str, dict[str, str]] = {
    "training": {
        "per_device_train_batch_size": "write `batch_size:`, the conversations of a whole step "
        "(per device x devices x accumulation), and `gradient_accumulation_steps:` to split it",
        "micro_batch_size": "write `batch_size:`, the conversations of a whole step, and "
        "`gradient_accumulation_steps:` to split it",
        "per_device_eval_batch_size": "delete it: validation uses `batch_size:`",
        "fp16": "delete it; `precision: bfloat16` computes in 16 bits without loss scaling",
        "temperature": "delete it: distributions are learned as the teachers gave them",
        "seed": "write `seed:` at the top of the file",
        "output_dir": "delete it, and give --out FOLDER on the command line",
        "resume_from_checkpoint": "delete it, and give --resume PATH on the command line",
        "deepspeed": "delete it, and run with --procs N --shard fsdp",
        "fsdp": "delete it, and run with --procs N --shard fsdp",
        "save_strategy": "delete it: checkpoints are saved every `checkpoint_every:` steps",
        "eval_strategy": "delete it: `eval_steps:` sets how often the loss is validated; 0 = never",
        "evaluation_strategy": "delete it: `eval_steps:` sets how often the loss is validated",
        "logging_strategy": "delete it: `log_every:` sets how often a line is logged",
        "save_total_limit": "delete it: the last two checkpoints are kept",
        "use_peft": "delete it, and write `student: {adapt: lora}`",
        "alpha": "write `event_weight:`, the weight of the teachers' distributions",
        "lmbda": "write `on_policy: {start_step: 0, share: 0.5}`, the share of on-policy steps",
        "beta": "delete it: off-policy steps use the forward divergence, on-policy steps the "
        "reverse one",
    },
    "student": {
        "torch_dtype": "delete it, and write `training: {precision: bfloat16}`",
        "dtype": "delete it, and write `training: {precision: bfloat16}`",
        "model_name_or_path": "write `model:`",
        "name": "write `model:`, a folder or hub id",
    },
    "teachers": {
        "model_name_or_path": "write `model:`",
        "weight": "delete it: the audition decides the shares; pin a teacher under "
        "`audition: {pinned: ...}`",
    },
    "corpus": {
        "prompts": "write `file:`, or `generate:` for persea's own questions",
        "dataset": "write `hub: {name: ...}` for a data set of the hub, `file:` for a file",
        "max_samples": "delete it, and give a file with fewer rows",
    },
}


def foreign_remedy(section: str, key: str) -> str:
    """Return the remedy for a name that other trainers use with another meaning; "" = none."""
    return FOREIGN_REMEDIES.get(section, {}).get(key, "")
