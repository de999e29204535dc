"""What the machine cannot hold is refused with exit code 7, and never loaded larger."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persea.errors import MissingRequirementError
from persea.models import placement as placements
from persea.models.identity import fingerprint
from persea.models.loading import ModelSource, load_model
from persea.models.placement import has_fast_bfloat16, placement_kwargs, uses_bfloat16
from tests.teachers.engines.test_transformers import SAPLINGS, opened

SAPLING = ModelSource(str(SAPLINGS / "gpt-oss-sapling"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU and every package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(placements, "find_spec", lambda name: object())


def test_no_arguments_without_quantisation_and_offloading() -> None:
    assert placement_kwargs("none", False, "t") == {}


@pytest.mark.parametrize(
    ("quantize", "offload"), [("8bit", False), ("4bit", True), ("mxfp4", False), ("none", True)]
)
def test_without_a_gpu_it_is_refused(
    quantize: str, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        MissingRequirementError,
        match=r"^teachers\.0\.model: .* needs a CUDA GPU, and there is none -> ",
    ) as caught:
        load_model(
            replace(SAPLING, quantize=quantize, offload=offload),
            opened("gpt-oss-sapling")[0],
            "teachers.0.model",
        )
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(("quantize", "lacks"), [("8bit", "bitsandbytes"), ("mxfp4", "kernels")])
def test_without_its_package_it_is_refused(
    gpu: None, quantize: str, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placements, "find_spec", lambda name: None if name == lacks else object())
    with pytest.raises(MissingRequirementError, match=f"needs {lacks} -> pip install {lacks}"):
        placement_kwargs(quantize, False, "t")


def test_mxfp4_on_an_old_gpu_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(MissingRequirementError, match=r"compute capability 7\.5"):
        placement_kwargs("mxfp4", False, "t")


def test_arguments_for_transformers(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "transformers.BitsAndBytesConfig", lambda **given: made.append(given) or "bits"
    )
    assert placement_kwargs("4bit", False, "t") == {
        "device_map": {"": 0},
        "quantization_config": "bits",
    }
    assert made[-1]["load_in_4bit"] and made[-1]["bnb_4bit_quant_type"] == "nf4"
    assert placement_kwargs("8bit", True, "t") == {
        "device_map": "auto",
        "quantization_config": "bits",
    }
    assert made[-1] == {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}
    assert (
        type(placement_kwargs("mxfp4", False, "t")["quantization_config"]).__name__ == "Mxfp4Config"
    )
    assert placement_kwargs("none", True, "t") == {"device_map": "auto"}


def test_a_teacher_in_fewer_bits_is_another_teacher() -> None:
    assert (
        len({fingerprint(replace(SAPLING, quantize=q), "t") for q in ("none", "8bit", "4bit")}) == 3
    )
    assert fingerprint(SAPLING, "t") == fingerprint(replace(SAPLING, offload=True), "t")


def test_a_teacher_in_bfloat16_is_another_teacher_and_nearly_the_same_model() -> None:
    half = replace(SAPLING, precision="bfloat16")
    assert fingerprint(half, "t") != fingerprint(SAPLING, "t")
    renderer = opened("gpt-oss-sapling")[0]
    models = [load_model(source, renderer, "t") for source in (SAPLING, half)]
    assert [m.dtype for m in models] == [torch.float32, torch.bfloat16]
    ids_BS = torch.tensor([renderer.vocabulary.encode("The sky is blue.")])
    with torch.no_grad():
        exact, rounded = (m(input_ids=ids_BS).logits.float().log_softmax(-1) for m in models)
    assert 0 < float((exact.exp() * (exact - rounded)).sum(-1).mean()) < 0.05  # nats


def test_auto_is_bfloat16_only_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert uses_bfloat16("bfloat16", cpu) and not uses_bfloat16("float32", gpu)
    for name, expected in (("avx512_bf16", True), ("arm_bf16", True), ("avx512_f", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert uses_bfloat16("auto", cpu) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not uses_bfloat16("auto", cpu)
    for supported in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        assert uses_bfloat16("auto", gpu) is supported
    assert not uses_bfloat16("auto", torch.device("mps"))


def test_a_processor_without_instructions_for_bfloat16_is_known() -> None:
    names = Path("/proc/cpuinfo")
    if not names.is_file() or platform.machine() != "x86_64":
        pytest.skip("the processor's instructions are not listed here")
    listed = set(names.read_text().split())
    if listed.isdisjoint({"avx512f", "amx_bf16"}):
        assert not has_fast_bfloat16(torch.device("cpu"))
    if "avx512_bf16" in listed:
        assert has_fast_bfloat16(torch.device("cpu"))
    assert has_fast_bfloat16(torch.device("cuda"))
