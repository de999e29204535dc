"""The Triton kernels against the functions they implement, in memory full of NaN.

They run in Triton's interpreter, in a process of its own, because Triton reads TRITON_INTERPRET
once, at import. Skipped where Triton is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import math, sys
import numpy as np, torch
from test_losses import case, random_bridge, said_of
from persea.errors import DataError
from persea.losses import Divergence
from persea.losses import triton_kernels as fused
from persea.losses.event_kl import event_kl_per_token
from persea.losses.divergence import divergence_with_gradient

torch.set_num_threads(1)
rooms = []
def poisoned(n, like):
    rooms.append(n)
    return torch.full((n,), math.nan)
fused.empty_float32 = poisoned
# rows of 8 to 40 columns take several rounds, and are no multiple of one
fused.BLOCK_COLUMNS, fused.BLOCK_EVENT_TOKENS = 16, 2

def walled(logits):
    "The same rows inside a wider matrix of NaN: what is read past a row's end would show."
    wide = torch.full((len(logits) + 1, logits.shape[1] + 11), math.nan)
    inside = wide[:len(logits), :logits.shape[1]]
    inside.copy_(logits)
    return wide, inside

def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=atol)

tried = 0
for seed in range(4):
    for share in (0.7, 1.0)[:2 - seed // 2]:
        c = case(seed)
        teachers = [t.targets for t in c.teachers]
        known = event_kl_per_token(c.logits_NV, c.labels_N, teachers, share)
        want = torch.empty_like(c.logits_NV)
        known.write_gradient(c.logits_NV, want)
        wide, inside = walled(c.logits_NV)
        loss, text, events, spoken = fused.triton_event_kl(inside, c.labels_N, teachers, share)
        close(loss, known.loss_N, 1e-5), close(text, known.cross_entropy_N, 1e-5)
        close(events, known.event_loss_N, 1e-5), close(inside, want)
        assert torch.equal(spoken, known.supervised_N)
        assert wide[:, c.logits_NV.shape[1]:].isnan().all() and wide[-1].isnan().all()
        tried += len(loss)
rng = np.random.default_rng(1)
bridge = random_bridge(rng, 30, 40, 4)  # events of about ten tokens
said = said_of(bridge, {n: rng.dirichlet(np.full(30, .3)) for n in (0, 2)}).targets
logits, tokens = 30 * torch.randn(3, 40), torch.tensor([1, 2, 3])
known = event_kl_per_token(logits, tokens, [said], 0.7)
want = torch.empty_like(logits)
known.write_gradient(logits, want)
loss = fused.triton_event_kl(logits, tokens, [said], 0.7)[0]
close(loss, known.loss_N, 1e-4), close(logits, want)
try:
    fused.triton_event_kl(logits, tokens, [said, said], 0.7)
except DataError as error:
    assert "two teachers" in str(error)
else:
    raise AssertionError("two teachers pass")
for divergence in Divergence:
    for seed in range(2):
        rng = np.random.default_rng(seed)
        mine, theirs = (
            torch.from_numpy(4 * rng.standard_normal((3, 37))).float() for _ in range(2)
        )
        if divergence is not Divergence.REVERSE:
            theirs[torch.from_numpy(rng.random((3, 37)) < 0.3)] = -math.inf
        wide, inside = walled(mine)
        other_wide, other = walled(theirs)
        loss = fused.triton_divergence(inside, other, divergence)
        want = divergence_with_gradient(mine, theirs, divergence)
        close(loss, want, 1e-5), close(inside, mine)
        assert wide[:, 37:].isnan().all()
        tried += len(loss)
from persea.losses import LMHead, divergence_loss_from_hidden, event_kl_loss_from_hidden
from persea.losses import chunked_head as heads
c = case(7)
weight, hidden = torch.randn(c.logits_NV.shape[1], 3), torch.randn(len(c.labels_N), 3)
heads.MAX_CHUNK_BYTES["cpu"] = 4 * weight.shape[0] * 3
found = []
for gpu in (False, True):
    heads.can_use_triton = lambda logits, gpu=gpu: gpu
    before = len(rooms)
    w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
    targets = [t.targets for t in c.teachers]
    outs = [event_kl_loss_from_hidden(h, LMHead(w, len(w)), c.labels_N, targets, 0.7),
            divergence_loss_from_hidden(h, LMHead(w, len(w)), (hidden, LMHead(weight, len(w))))]
    sum(out.loss for out in outs).backward()
    found.append((outs[0].loss.detach(), outs[1].loss.detach(), w.grad, h.grad))
    assert (len(rooms) > before) == gpu
for a, b in zip(*found):
    close(a, b, 1e-5)
assert tried > 40 and rooms, "nothing was tried, or nothing poisoned"
print("tried", tried)
"""


def test_kernels_in_tritons_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install -e '.[dev]' on Linux x86-64 brings it")
    here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    path = os.pathsep.join(
        [str(here), str(root / "bench"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", CASES],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("tried ")
