#!/usr/bin/env bash
# transformers 5.24.0: the old names `past_key_values` and `cache_params` of a forward pass's cache.
#
# Guess: both names still work, because a warning calls both deprecated ("Use `cache` instead"); or a wrong one is
# refused. And a text that is computed in pieces behind a cache has the logits of the whole text.
# Seen: Mamba takes `cache_params` and ignores `past_key_values`; Jamba and Llama take `past_key_values` and ignore
# `cache_params`: no error, no further warning, and the logits of a token without the text before it. Under `cache` all
# are right, one token after another. In pieces of several tokens Mamba's and Jamba's logits differ from the whole text's
# under `cache` too, Llama's do not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/env/bin/pip" install -q --disable-pip-version-check transformers==5.24.0
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$dir/env/bin/python" - 2> "$dir/log" <<'PY' || { tail -5 "$dir/log"; exit 1; }
import torch
from transformers import AutoModelForCausalLM, JambaConfig, LlamaConfig, MambaConfig

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "Mamba": MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8),
    "Jamba": JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
                         num_experts_per_tok=1, mamba_d_state=8, **SIZES, **HEADS),
    "Llama": LlamaConfig(num_hidden_layers=2, **SIZES, **HEADS),
}


def most_nats(model, name, step):
    """Largest difference of log-probabilities: 24 tokens and then pieces behind a cache, and the whole text of 48."""
    ids = torch.randint(0, 128, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        cache, found = None, []
        for k in (0, *range(24, 48, step)):
            given = {} if cache is None else {name: cache}
            output = model(input_ids=ids[:, k : k + step if k else 24], use_cache=True, **given)
            cache = output.cache
            found.append(output.logits)
    return (torch.cat(found, 1).log_softmax(-1) - whole).abs().max().item()


seen = {}
for kind, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, step in (("cache", 1), ("past_key_values", 1), ("cache_params", 1), ("cache", 8)):
        seen[kind, name, step] = most_nats(model, name, step)
        print(f"{kind}, {name}, pieces of {step}: at most {seen[kind, name, step]:.4f} nats from the whole text")
wrong = {key for key, nats in seen.items() if nats > 0.05}
expected = {("Mamba", "past_key_values", 1), ("Jamba", "cache_params", 1), ("Llama", "cache_params", 1)}
expected |= {("Mamba", "cache", 8), ("Jamba", "cache", 8)}
assert wrong == expected, f"changed: {sorted(wrong ^ expected)}"
PY
