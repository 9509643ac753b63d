"""In what products are computed, by what a CPU says of itself."""

import pytest
import torch

from moe.sparse.product import has_bf16_units, product_dtype


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_vnni": True}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "sve": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({}, False),
    ],
    ids=["Zen 3", "Skylake", "Zen 4", "Sapphire Rapids", "Graviton 2", "Graviton 3", "unknown"],
)
def test_only_some_processors_multiply_bf16(capabilities: dict[str, object], native: bool) -> None:
    assert has_bf16_units(capabilities) == native


def test_the_processor_here_says_what_it_can() -> None:
    """A name that torch no longer knew would read as no."""
    known = torch.cpu.get_capabilities()
    assert {"avx512_bf16", "amx_bf16"} <= known.keys() or "bf16" in known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    assert product_dtype(torch.empty(1, dtype=dtype)) == dtype


def test_bf16_stays_on_other_devices() -> None:
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    here = has_bf16_units(torch.cpu.get_capabilities())
    expected = torch.bfloat16 if here else torch.float32
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16)) == expected
