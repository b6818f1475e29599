"""GPUs by name, for --gpu: what NVML reports in total, and what CUDA can use of that. A table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamprune.errors import SettingsError

MIB = 1024**2

# What CUDA can use has been published for a few GPUs only: it is 451 to 494 MiB less than NVML's total, or up to 2 %.
# Of the other GPUs at least that much is taken off: 16 GB GPUs of the RTX 50 series lose 482 MiB, which is 3 %.
_LEAST_GAP_MIB = 512
_LEAST_GAP_SHARE = 0.02


@dataclass(frozen=True)
class KnownGpu:
    """A GPU as it leaves the factory, in bytes. `estimated`: what CUDA can use is derived, not measured."""

    key: str
    names: tuple[str, ...]  # as NVML reports them; some GPUs are sold under several
    total_bytes: int
    usable_bytes: int
    estimated: bool

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @property
    def gap_bytes(self) -> int:
        """What NVML counts and CUDA cannot use, with nothing running."""
        return self.total_bytes - self.usable_bytes


def _known(key: str, names: str, total_mib: int, usable_mib: int | None = None) -> KnownGpu:
    estimated = usable_mib is None
    if usable_mib is None:
        usable_mib = total_mib - max(_LEAST_GAP_MIB, round(total_mib * _LEAST_GAP_SHARE))
    return KnownGpu(key, tuple(names.split(" | ")), total_mib * MIB, usable_mib * MIB, estimated)


# Totals are those of `nvidia-smi` with a current driver and the memory check (ECC) as delivered. For the RTX 3090,
# where measurements range from 24125 to 24258 MiB, the lowest counts: a budget that is promised must be there.
GPUS = (
    _known("rtx-3060", "NVIDIA GeForce RTX 3060", 12288),
    _known("rtx-3080", "NVIDIA GeForce RTX 3080", 10240),
    _known("rtx-3080-ti", "NVIDIA GeForce RTX 3080 Ti", 12288),
    _known("rtx-3090", "NVIDIA GeForce RTX 3090", 24576, 24125),
    _known("rtx-3090-ti", "NVIDIA GeForce RTX 3090 Ti", 24564),
    _known("rtx-4060-ti-8gb", "NVIDIA GeForce RTX 4060 Ti", 8188),
    _known("rtx-4060-ti-16gb", "NVIDIA GeForce RTX 4060 Ti", 16380),
    _known("rtx-4070-ti-super", "NVIDIA GeForce RTX 4070 Ti SUPER", 16376),
    _known("rtx-4080", "NVIDIA GeForce RTX 4080", 16376),
    _known("rtx-4080-super", "NVIDIA GeForce RTX 4080 SUPER", 16376),
    _known("rtx-4090", "NVIDIA GeForce RTX 4090", 24564, 24082),
    _known("rtx-5060-ti-8gb", "NVIDIA GeForce RTX 5060 Ti", 8151),
    _known("rtx-5060-ti-16gb", "NVIDIA GeForce RTX 5060 Ti", 16311),
    _known("rtx-5070", "NVIDIA GeForce RTX 5070", 12227),
    _known("rtx-5070-ti", "NVIDIA GeForce RTX 5070 Ti", 16303),
    _known("rtx-5080", "NVIDIA GeForce RTX 5080", 16303),
    _known("rtx-5090", "NVIDIA GeForce RTX 5090", 32607, 32113),
    _known("rtx-a4000", "NVIDIA RTX A4000", 16376),
    _known("rtx-a6000", "NVIDIA RTX A6000", 49140),
    _known("rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", 49140),
    _known("t4", "Tesla T4 | NVIDIA T4", 15360),
    _known("a10", "NVIDIA A10", 23028),
    _known("l4", "NVIDIA L4", 23034),
    _known("l40s", "NVIDIA L40S", 46068),
    _known("a100-40gb", "NVIDIA A100-SXM4-40GB | NVIDIA A100-PCIE-40GB", 40960),
    _known("a100-80gb", "NVIDIA A100-SXM4-80GB | NVIDIA A100 80GB PCIe", 81920),
    _known("h100", "NVIDIA H100 80GB HBM3 | NVIDIA H100 PCIe", 81559),
    _known("h200", "NVIDIA H200", 143771),
)


def known_gpu(name: str) -> KnownGpu:
    """The GPU that `name` means: its key, or any usual spelling ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090").

    Raises SettingsError, with the names that are known, for any other, and for a name that says too little.
    """
    wanted = _spelling(name).removeprefix("rtx")
    by_key = [known for known in GPUS if _spelling(known.key).removeprefix("rtx") == wanted]
    found = by_key or [
        known for known in GPUS if wanted in {_spelling(each).removeprefix("rtx") for each in known.names}
    ]
    if len(found) == 1:
        return found[0]
    if found:
        keys = " or ".join(f"--gpu {known.key}" for known in found)
        raise SettingsError(f"--gpu {name!r} is sold with different memory. Use {keys}.")
    raise SettingsError(
        f"--gpu {name!r} is not a GPU that streamprune knows. It knows {', '.join(known.key for known in GPUS)}. "
        "For any other GPU give the memory that may be used: --budget-gib."
    )


def find_known_gpu(name: str, total_bytes: int) -> KnownGpu | None:
    """The table's GPU for one that NVML reports, or None. Name and size must agree (within 2 %).

    Some names are sold with different memory, and with the memory check (ECC) switched a GPU's total changes by 6 %.
    """
    for known in GPUS:
        same_size = abs(known.total_bytes - total_bytes) <= 0.02 * known.total_bytes
        if same_size and is_named(known, name):
            return known
    return None


def is_named(known: KnownGpu, name: str) -> bool:
    """Whether NVML's `name` is that of this GPU; older drivers leave the maker out."""
    return _spelling(name) in {_spelling(each) for each in known.names}


def _spelling(name: str) -> str:
    """What is left of a name without maker, brand, case and separators."""
    words = [
        word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in {"nvidia", "geforce", "tesla", "gpu"}
    ]
    return "".join(words)
