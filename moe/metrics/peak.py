"""Device -> the FLOP/s that one rank could reach, for the MFU."""

import time

import torch

from moe.sparse.product import Products

DATA_SHEET_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "A10G": 70.0,
}
"""Dense bf16 TFLOP/s by part of the device's name, from NVIDIA's data sheets; first match counts."""


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float:
    """FLOP/s that one rank could reach: as given, by data sheet (bf16 on a known GPU), or a measured matmul."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, tflops in DATA_SHEET_TFLOPS.items():
            if part in name:
                return tflops * 1e12
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    products = Products.of(a, size, a)  # as the model multiplies
    a = a.to(products.dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        begin = time.perf_counter()
        products.multiply(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
