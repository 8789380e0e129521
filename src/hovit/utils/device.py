"""The device of this process: choose it, describe it, and what memory it used.

Torch is imported only by functions that need it, because records describe devices without it.
"""

from __future__ import annotations

import ctypes
import platform
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .errors import HovitError
from .machine import usable_cpus
from .strict import Strict

if TYPE_CHECKING:
    import torch

freed_memory_kept = False  # whether this process keeps freed memory


class Device(Strict):
    """The device that did the work.

    Args:
        kind: `cpu` or `cuda`.
        name: processor or card.
        driver: the card's driver, if any.
        threads: CPU threads that torch used.
        cpu_capability: vector instructions of the processor, as PyTorch names them (`AVX2`,
            `AVX512`); virtual machines may give different processors the same name. Older records
            do not state it.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    driver: str = ""
    threads: int
    cpu_capability: str = Field(default="", exclude_if=lambda value: value == "")

    def __str__(self) -> str:
        if self.kind != "cpu":
            return self.name
        vectors = f" with {self.cpu_capability}" if self.cpu_capability else ""
        return f"{self.name}{vectors}, {self.threads} thread{'s' * (self.threads > 1)}"


def pick_device(accelerator: str = "auto") -> torch.device:
    """The requested device; `auto` is `cuda` if available, else `cpu`.

    Raises:
        HovitError: for an unknown name, or `cuda` without a GPU.
    """
    import torch

    there = torch.cuda.is_available()
    if accelerator == "auto":
        accelerator = "cuda" if there else "cpu"
    if accelerator not in ("cpu", "cuda") or (accelerator == "cuda" and not there):
        raise HovitError(
            f"--accelerator {accelerator}: {'use cpu or cuda' if there else 'there is only cpu'}"
        )
    return torch.device(accelerator)


def set_threads(wanted: int) -> None:
    """Set the CPU threads of torch, at most one for each processor that may be used."""
    import torch

    torch.set_num_threads(min(wanted, usable_cpus()))


def describe_device(device: torch.device) -> Device:
    """Name, driver, threads and vector instructions, for a record."""
    import torch

    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Device(kind="cuda", name=name, driver=_nvidia_driver(), threads=threads)
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = "" if capability in ("DEFAULT", "NO AVX") else capability
    return Device(kind="cpu", name=_processor(), threads=threads, cpu_capability=vectors)


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, so that the next pass reuses it.

    glibc may return large freed blocks to the system, depending on earlier allocations. Each pass
    then faults their pages in again, which can double a model's time and changes ratios between
    models from process to process (`bench/allocator.py`). Peak memory grows. Other C libraries
    keep their default.

    Returns:
        whether memory is kept: False if the C library has no `mallopt`.
    """
    global freed_memory_kept
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # musl, macOS; Windows
        return False
    freed_memory_kept = bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))
    return freed_memory_kept


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        words = version.read_text().splitlines()[0].split()
        return next((w for w in words if w[0].isdigit() and w.count(".") >= 1), "")
    return ""


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MB: of the GPU; on a CPU, of the largest of this process and its
    children that have ended.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(who).ru_maxrss for who in whose)
    return peak / 1e3 if platform.system() != "Darwin" else peak / 1e6
