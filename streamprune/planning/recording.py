"""How experts are computed on a device while they are recorded, for the plan of memory."""

from __future__ import annotations

import torch

from streamprune.fit.cache import Recording
from streamprune.hardware.device import is_gpu
from streamprune.models.open import OpenedMoE
from streamprune.saliency.hooks import FILL_SHARE, computes_in_parts
from streamprune.saliency.statistics import CPU_PART_VALUES, GPU_PART_VALUES


def recording_on(device: torch.device, opened: OpenedMoE) -> Recording | None:
    """The parts and the padding with which `saliency.hooks` computes a model's experts on a device.

    None if some have steps of their own, which the formula for recorded experts does not count.
    """
    if not computes_in_parts(opened.skeleton):
        return None
    if is_gpu(device):
        return Recording(GPU_PART_VALUES, 0.0)
    return Recording(CPU_PART_VALUES, 1 / FILL_SHARE if opened.dtype.itemsize == 2 else 0.0)
