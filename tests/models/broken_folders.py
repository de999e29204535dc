"""Ways in which a model folder can be broken or hostile: each changes a good folder in place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file

Damage: TypeAlias = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
LAYER = "model.layers.0."


def edit_tensors(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Damage:
    def damage(folder: Path) -> None:
        tensors = change(load_file(folder / WEIGHTS))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def without(part: str) -> Damage:
    return edit_tensors(lambda tensors: {k: v for k, v in tensors.items() if part not in k})


def with_value(name: str, value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[0] = value
        return tensors

    return edit_tensors(change)


def configured(file: str = "config.json", **keys: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(config | keys))

    return damage


def written(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return damage


def indexed(shard: Any, weights_at: str = "") -> Damage:
    """The weights lie at `weights_at`, and an index names `shard` for each tensor."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)})
        )
        if weights_at:
            path = folder / weights_at
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path, metadata={"format": "pt"})

    return damage


def pickled(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    indexed("pytorch_model.bin")(folder)
    torch.save(tensors, folder / "pytorch_model.bin")


def overlapping(folder: Path) -> None:
    """Two files hold the same tensor."""
    tensors = load_file(folder / WEIGHTS)
    indexed("a.safetensors", "a.safetensors")(folder)
    save_file(tensors, folder / "b.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "b.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def linked_out(name: str) -> Damage:
    def damage(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def linked(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def cut(name: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * keep)])

    return damage


def header(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(change(whole))

    return damage


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def _vocab(content: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    vocab = content["model"]["vocab"]
    return vocab, list(vocab)


def _doubled_id(content: dict[str, Any]) -> None:
    vocab, names = _vocab(content)
    vocab[names[270]] = vocab[names[271]]


def _id(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        vocab, names = _vocab(content)
        vocab[names[270]] = value

    return change


def _growing(content: dict[str, Any]) -> None:
    """A normalizer that writes 16^12 letters for one."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    content["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 12}


def _shrinking(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": ""}


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HUGE = 10**9

# Each of these folders must be refused with exit code 3.
REFUSED: dict[str, Damage] = {
    # tensors
    **{
        f"without {part}": without(part)
        for part in (
            f"{LAYER}mlp",
            f"{LAYER}self_attn",
            LAYER,
            f"{LAYER}input_layernorm",
            f"{LAYER}post_attention_layernorm",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "up_proj",
            "gate_proj",
            "down_proj",
            "layernorm",
            "model.norm",
            "embed_tokens",
        )
    },
    "renamed tensor": edit_tensors(
        lambda t: {k.replace("up_proj", "upward_proj"): v for k, v in t.items()}
    ),
    "renamed prefix": edit_tensors(
        lambda t: {k.replace("model.layers", "net.blocks"): v for k, v in t.items()}
    ),
    "no tensors": edit_tensors(lambda t: {}),
    "one tensor": edit_tensors(lambda t: {"model.norm.weight": t["model.norm.weight"]}),
    "tensor of another shape": edit_tensors(
        lambda t: t | {"model.norm.weight": t["model.norm.weight"][:-1].clone()}
    ),
    "tensor of more dimensions": edit_tensors(
        lambda t: t | {"model.norm.weight": t["model.norm.weight"][None].clone()}
    ),
    "bias that the configuration has not": edit_tensors(
        lambda t: t | {f"{LAYER}self_attn.q_proj.bias": torch.ones(32)}
    ),
    "layer that the configuration has not": edit_tensors(
        lambda t: t | {k.replace(".0.", ".1."): v.clone() for k, v in t.items() if LAYER in k}
    ),
    **{
        f"{value} in {name}": with_value(name, value)
        for value in (float("nan"), float("inf"), float("-inf"))
        for name in ("model.norm.weight", "model.embed_tokens.weight", f"{LAYER}mlp.up_proj.weight")
    },
    # files of weights
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "pickled weights": pickled,
    "index without pickles of its own": indexed("pytorch_model.bin"),
    "index to the parent": indexed("../w.safetensors", "../w.safetensors"),
    "index to a subfolder": indexed("sub/w.safetensors", "sub/w.safetensors"),
    "index to a device": indexed("/dev/zero"),
    "index to an absolute path": indexed("/etc/hosts.safetensors"),
    "index to nothing": indexed("none.safetensors"),
    "index to a number": indexed(1),
    "index to a list": indexed(["a"]),
    "index to a NUL": indexed("a\0.safetensors"),
    "index to an empty name": indexed(""),
    "index with an empty map": lambda folder: (
        (folder / WEIGHTS).unlink(),
        (folder / INDEX).write_text('{"weight_map": {}}'),
    )[0],
    "index with a list": lambda folder: (
        (folder / WEIGHTS).unlink(),
        (folder / INDEX).write_text('{"weight_map": []}'),
    )[0],
    "index that is no JSON": lambda folder: (
        (folder / WEIGHTS).unlink(),
        (folder / INDEX).write_text("{"),
    )[0],
    "two files with one tensor": overlapping,
    "configuration that names weights elsewhere": configured(
        transformers_weights="../w.safetensors"
    ),
    "configuration that names weights in a subfolder": configured(
        transformers_weights="s/w.safetensors"
    ),
    "configuration that names pickles": configured(transformers_weights="w.bin"),
    "configuration that names no file": configured(transformers_weights=3),
    "length of the header": header(lambda b: (1 << 40).to_bytes(8, "little") + b[8:]),
    "length 0 of the header": header(lambda b: bytes(8) + b[8:]),
    "header that is no JSON": header(lambda b: b[:8] + b"x" + b[9:]),
    "header that is no UTF-8": header(lambda b: b[:20] + b"\xff" + b[21:]),
    "bytes after the weights": header(lambda b: b + b"x"),
    "random bytes as weights": written(WEIGHTS, bytes(range(256)) * 8),
    "text as weights": written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
    **{f"weights cut at {share}": cut(WEIGHTS, share) for share in (0, 0.001, 0.1, 0.5, 0.999)},
    "adapter": written("adapter_config.json", b'{"base_model_name_or_path": "some/other"}'),
    # links, FIFOs, devices, folders
    **{
        f"link out of the folder: {name}": linked_out(name)
        for name in (WEIGHTS, "config.json", "tokenizer.json", "chat_template.jinja")
    },
    "link to the parent": linked("extra.json", ".."),
    "link to /dev/zero": linked("extra.json", "/dev/zero"),
    "link to /dev/zero as the tokenizer": linked("tokenizer.json", "/dev/zero"),
    "link to nothing": linked("config.json", "nothing"),
    "link to itself": linked(WEIGHTS, WEIGHTS),
    "link to secrets": linked("LICENSE", "/etc/passwd"),
    "link to a folder of templates": linked("additional_chat_templates", "/dev"),
    **{
        f"FIFO: {name}": fifo(name)
        for name in (
            WEIGHTS,
            INDEX,
            "config.json",
            "tokenizer.json",
            "generation_config.json",
            "chat_template.jinja",
            "extra.json",
            "extra.safetensors",
            "README.md",
            "additional_chat_templates/x.jinja",
        )
    },
    **{
        f"folder instead of {name}": folder_instead(name)
        for name in (WEIGHTS, *CONFIGS, "tokenizer.json", "chat_template.jinja")
    },
    # configurations
    **{
        f"{name} is {kind}": written(name, content)
        for name in CONFIGS
        for kind, content in {
            "empty": b"",
            "cut": b'{"a": ',
            "a list": b"[]",
            "null": b"null",
            "no UTF-8": b"\xff\xfe{}",
            "nested": NESTED,
        }.items()
    },
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "no model type": written("config.json", b'{"hidden_size": 32}'),
    "unknown model type": configured(model_type="no_such_model"),
    "a model that is no language model": configured(model_type="vit"),
    "100,000 layers": configured(num_hidden_layers=100_000),
    "10^9 layers": configured(num_hidden_layers=HUGE),
    "one layer more": configured(num_hidden_layers=2),
    "no layers": configured(num_hidden_layers=0),
    "minus one layer": configured(num_hidden_layers=-1),
    "text as number of layers": configured(num_hidden_layers="1"),
    "10^9 hidden": configured(hidden_size=HUGE),
    "text as hidden size": configured(hidden_size="x"),
    "minus hidden size": configured(hidden_size=-32),
    "no heads": configured(num_attention_heads=0),
    "10^9 rows of the embedding": configured(vocab_size=HUGE),
    "no rows of the embedding": configured(vocab_size=0),
    "another width of the MLP": configured(intermediate_size=7),
    "10^9 experts": configured(num_local_experts=HUGE),
    "own code": configured(auto_map={"AutoModelForCausalLM": "own.Model"}),
    "own code of the tokenizer": configured(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}
    ),
    "kernel of the hub": configured(attn_implementation="owner/kernel"),
    "private kernel of the hub": configured(_attn_implementation="owner/kernel"),
    "kernel of the hub, nested": configured(text_config={"attn_implementation": "owner/kernel"}),
    "kernels of the hub by part": configured(attn_implementation={"": "owner/kernel"}),
    "GPTQ weights without its package": configured(
        quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    # tokenizers
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    **{f"tokenizer cut at {share}": cut("tokenizer.json", share) for share in (0, 0.1, 0.9)},
    "tokenizer that is a list": written("tokenizer.json", b"[]"),
    "nested tokenizer": written("tokenizer.json", NESTED),
    "doubled token id": tokenizer(_doubled_id),
    "negative token id": tokenizer(_id(-1)),
    "text as token id": tokenizer(_id("x")),
    "token id of 4 billion": tokenizer(_id(2**32 - 2)),
    "normalizer without end": tokenizer(_growing),
    "normalizer that loses letters": tokenizer(_shrinking),
    "template that does not compile": written("chat_template.jinja", b"{% for %}"),
    "template that is no UTF-8": written("chat_template.jinja", b"\xff\xfe"),
    "template of 2 MB": written("chat_template.jinja", b"{# " + b"x" * (2 << 20) + b" #}"),
}
