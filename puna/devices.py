"""Which device and number type to compute with, and what memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from puna.errors import SettingsError, nearest

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
"""Of torch's CPU allocators, and of CUDA where it finds no main memory that it can pin."""
DEVICES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device named, or the best one present for `auto`: CUDA, then MPS, then the CPU.

    Raises:
        SettingsError: the name is unknown, or this machine has no such device.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise SettingsError(
            f"device must be one of {', '.join(DEVICES)}, got {name!r}.{nearest(name, DEVICES)}"
        )
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        kind = next(candidate for candidate in ("cuda", "mps", "cpu") if available[candidate])
    if not available[kind]:
        raise SettingsError(f'device {name!r} is not available on this machine; use device = "auto"')
    if kind == "cuda":
        return torch.device("cuda", int(index) if index else local_rank)
    return torch.device(kind)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type named; `auto` is bfloat16 where the hardware multiplies in it, else float32.

    Raises:
        SettingsError: the name is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise SettingsError(
            f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}.{nearest(name, DTYPES)}"
        )
    return DTYPES[name]


def product_type(x: torch.Tensor) -> torch.dtype:
    """The type in which matrix products of x are formed: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware, rather than emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has_library = torch.backends.mkldnn.is_available()  # oneDNN; torch for a Mac comes without
        return bool(
            has_library and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_has_bfloat16_products()
        )
    return False


def _cpu_has_bfloat16_products() -> bool:
    """oneDNN accepts bfloat16 on any AVX-512 machine; only these instructions make it faster than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities in ("NEON", "SVE256", "DEFAULT"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as far as the system tells.

    The CPU's are those that programs can take without swapping; half of all memory where only that is known.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def total_memory(device: torch.device) -> int:
    """Bytes that a device has, free or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's, a device's, or an allocator's of main memory, which is a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)
