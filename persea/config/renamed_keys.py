"""Recipe keys and values that have another name: persea's old names, and those of other trainers.

All are read, each with a notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persea.config.foreign_keys import FOREIGN_KEYS, FOREIGN_VALUES
from persea.config.yaml_source import KeyPath, YamlSource

# (path of the section, "*" = every entry of a list), old key -> new key. A section's own path is
# written with new keys: renaming starts at the top of the file.
RENAMED_KEYS: dict[KeyPath, dict[str, str]] = {
    (): {"today": "template_date"},
    ("teachers", "*"): {"yardstick": "reference"},
    ("teachers", "*", "endpoint"): {
        "served": "served_model_name",
        "top": "top_logprobs",
        "dial": "send_effort",
        "stall": "stall_timeout_s",
        "patience": "give_up_after_s",
        "budget": "max_total_tokens",
        "attempts": "max_attempts",
    },
    ("corpus", "*"): {
        "modes": "effort_shares",
        "near": "near_duplicate_threshold",
        "broken": "on_malformed",
    },
    ("audition",): {"batch": "batch_size", "floor": "min_score"},
    ("capture",): {
        "rows": "distributions",
        "tau": "sampling_threshold",
        "kl": "max_kl",
        "batch": "batch_size",
        "unit": "prompts_per_unit",
        "verify": "drop_wrong_answers",
        "tokens": "max_total_tokens",
        "hours": "max_hours",
    },
    ("training",): {
        "batch": "batch_size",
        "warmup": "warmup_steps",
        "event_share": "event_weight",
        "completion": "partial_tokens",
        "recompute": "gradient_checkpointing",
        "clip": "max_grad_norm",
        "max_tokens": "max_length",
        "accumulate": "gradient_accumulation_steps",
        "micro_batches": "gradient_accumulation_steps",
        "evaluate_every": "eval_steps",
        "schedule": "lr_scheduler_type",
        "held_out": "validation_share",
        "skips": "max_skipped_steps",
        "balance": "loss_balancing",
    },
    ("training", "on_policy"): {"after": "start_step", "refresh": "max_staleness_steps"},
    ("evaluation",): {
        "batch": "batch_size",
        "sets": "benchmarks",
        "lm_eval": "lm_eval_results",  # as a mapping; a list names tasks to run
        "allow_regression": "allow_safety_regression",
    },
    ("evaluation", "benchmarks", "*"): {"set": "benchmark"},
    ("check",): {
        "floor": "min_common_share",
        "disagreement": "max_disagreement",
        "lines": "max_lines_per_text",
        "likelihood": "measure_likelihood",
    },
}
# (path of the key, written with new keys), old value -> new value
RENAMED_VALUES: dict[KeyPath, dict[str, str]] = {
    ("student", "model"): {"words": "text_only"},
    ("teachers", "*", "model"): {"words": "text_only"},
    ("training", "on_policy", "objective"): {"chunk": "span_likelihood"},
}


def rename_old_keys(source: YamlSource) -> None:
    """Give the keys and values of a recipe their new names, in place.

    Each old name adds a line to `source.notices`. Where a section has the old and the new name of
    one key, a problem is added and the value of the new name is kept.
    """
    _rename_in_section(source, source.data, ())


def rename_in_plain_data(data: Any) -> Any:
    """Give parsed recipe data, such as a run folder's `recipe.yaml`, its new names in place."""
    if isinstance(data, dict):
        rename_old_keys(YamlSource(Path(), {(): ""}, data))
    return data


def rename_override(source: YamlSource, keys: list[str], origin: str) -> list[str]:
    """Return the keys of a `--set` override under their new names; add a notice for an old one.

    Args:
        source: The recipe; its notices are extended.
        keys: Parts of the dotted key.
        origin: The override as error messages show it.
    """
    path: KeyPath = ()
    for depth, key in enumerate(keys, start=1):
        # a whole value of `evaluation.lm_eval` names tasks; a key below it is an old results file
        is_list = key == "lm_eval" and depth == len(keys)
        new = key if is_list else _renamed(path, key)
        if new != key:
            old, renamed = (".".join(map(str, (*path, name))) for name in (key, new))
            is_old = key in RENAMED_KEYS.get(_pattern(path), {})
            (_add_notice if is_old else _add_foreign_notice)(source, origin, old, renamed)
        path = (*path, new)
    return [str(k) for k in path]


def _rename_in_section(source: YamlSource, value: Any, path: KeyPath) -> None:
    if isinstance(value, list):
        for k, item in enumerate(value):
            _rename_in_section(source, item, (*path, k))
    if not isinstance(value, dict):
        return
    for key in list(value):
        new = _renamed(path, key)
        if new != key and not (key == "lm_eval" and isinstance(value[key], list)):
            _rename_key(source, value, path, key, new)
    for key, item in value.items():
        here = (*path, key)
        _rename_in_section(source, item, here)
        if (new_value := _renamed_value(here, item)) is not None:
            value[key] = new_value
            if item in RENAMED_VALUES.get(_pattern(here), {}):
                dotted = ".".join(map(str, here))
                old, new = f"{dotted}: {item}", f"{dotted}: {new_value}"
                _add_notice(source, source.locations.get(here, ""), old, new)


def _rename_key(
    source: YamlSource, section: dict[str, Any], path: KeyPath, old: str, new: str
) -> None:
    old_path, new_path = (*path, old), (*path, new)
    old_name, new_name = (".".join(map(str, p)) for p in (old_path, new_path))
    if new in section:
        kind = "the old" if old in RENAMED_KEYS.get(_pattern(path), {}) else "another"
        source.add_problem(old_path, f"is {kind} name of `{new}`, which is given too", "keep one")
        del section[old]
        return
    location = source.locations.get(old_path, "")
    if old in RENAMED_KEYS.get(_pattern(path), {}):
        _add_notice(source, location, old_name, new_name)
    else:
        _add_foreign_notice(source, location, old_name, new_name)
    renamed = {new if k == old else k: v for k, v in section.items()}
    section.clear()
    section.update(renamed)
    source.rename_path(old_path, new_path)


def _add_notice(source: YamlSource, location: str, old: str, new: str) -> None:
    notice = f"{location}: {old} is now {new}; the old name still works"
    if notice not in source.notices:
        source.notices.append(notice)


def _add_foreign_notice(source: YamlSource, location: str, foreign: str, name: str) -> None:
    notice = f"{location}: {foreign} is read as {name}, its name here"
    if notice not in source.notices:
        source.notices.append(notice)


def _pattern(path: KeyPath) -> KeyPath:
    return tuple("*" if isinstance(k, int) or k.isdecimal() else k for k in path)


def _renamed(path: KeyPath, key: str) -> str:
    pattern = _pattern(path)
    old = RENAMED_KEYS.get(pattern, {}).get(key)
    return old or FOREIGN_KEYS.get(pattern, {}).get(key, key)


def _renamed_value(path: KeyPath, value: Any) -> str | None:
    if not isinstance(value, str | bool):
        return None
    pattern = _pattern(path)
    old = RENAMED_VALUES.get(pattern, {}).get(value) if isinstance(value, str) else None
    return old or FOREIGN_VALUES.get(pattern, {}).get(value)
