"""How wide experts may become: the widths that a model allows, and which formats and kernels take them. No torch.

A channel is a row of the gate and up projections and a column of the down projection; the width of an expert is its
number of channels, `moe_intermediate_size` in most configs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from streamprune.errors import SettingsError
from streamprune.models.config_json import WidthSpec

#: What a width is preferably a multiple of: blocks of FP8 checkpoints and 4-bit groups have 128 values, or 64, or 32.
MULTIPLES = (128, 64, 32, 16, 8)
#: The default multiple is at most this share of the width, so that there is a choice of widths.
_SHARE = 4
#: Rows of a matrix must be a multiple of so many bytes for torch's grouped product, by which transformers runs experts.
ALIGNED_BYTES = 16
#: Values of a block in llama.cpp's k-quants.
K_QUANT = 256


def default_multiple(width: int) -> int:
    """What new widths are multiples of, for experts of this width: the largest of MULTIPLES that leaves a choice."""
    return next((each for each in MULTIPLES if width % each == 0 and each * _SHARE <= width), 1)


def allowed_widths(spec: WidthSpec, multiple: int | None = None) -> list[int]:
    """The smaller widths that experts may get, ascending: multiples of `multiple` (None: the default).

    Where shared experts have a width that is stated as a multiple of this one, it has to stay one. Raises SettingsError
    if there is none.
    """
    step = multiple or default_multiple(spec.width)
    widths = [width for width in range(step, spec.width, step) if spec.shared_with(width) is not None]
    if not widths:
        shared = f", with which shared experts keep their {spec.width * spec.shared_count}" if spec.shared else ""
        raise SettingsError(
            f"--width-multiple {step}: no multiple of {step} is smaller than the {spec.width} channels that each "
            f"expert has{shared}. Use a smaller one."
        )
    return widths


def check_width(spec: WidthSpec, width: int) -> None:
    """Raise SettingsError unless experts may get this width."""
    if not 1 <= width < spec.width:
        raise SettingsError(
            f"--width {width}: each expert has {spec.width} channels. Keep between 1 and {spec.width - 1} of them, "
            f"preferably a multiple of {default_multiple(spec.width)}."
        )
    if spec.shared_with(width) is None:
        total = spec.width * spec.shared_count
        others = [each for each in range(1, spec.width) if spec.shared_with(each) is not None]
        place = bisect_left(others, width)
        raise SettingsError(
            f"--width {width}: the shared experts of this model have {total} channels, which config.json states as "
            f"{spec.shared} times this width, and {total} is not a multiple of {width}. Nearest widths: "
            f"{' and '.join(map(str, others[max(0, place - 1) : place + 1]))}."
        )


def width_for_share(spec: WidthSpec, share: float, multiple: int | None = None) -> int:
    """The smallest allowed width with at least `share` of the channels; the largest allowed one if none has so many."""
    widths = allowed_widths(spec, multiple)
    # The tolerance keeps a half of 768 from becoming more than 384.
    return widths[min(len(widths) - 1, bisect_left(widths, math.ceil(share * spec.width - 1e-9)))]


def is_aligned(width: int, itemsize: int) -> bool:
    """Whether transformers' grouped matrix product takes this width; `itemsize` is the bytes of a weight."""
    return width * itemsize % ALIGNED_BYTES == 0


def width_notes(width: int, itemsize: int) -> Iterator[str]:
    """What kernels and formats will not like about a width; `itemsize` is the bytes of a weight."""
    if not is_aligned(width, itemsize):
        yield (
            f"{width} channels are no multiple of {ALIGNED_BYTES // itemsize} ({ALIGNED_BYTES} bytes), which "
            "transformers' grouped matrix product needs: load the result with "
            'experts_implementation="eager", which is slower.'
        )
    blocks = {"FP8 blocks": 128, "4-bit groups of 32": 32, "llama.cpp's k-quants": K_QUANT}
    refused = [f"{name} ({size})" for name, size in blocks.items() if width % size]
    if refused:
        yield f"{width} channels are no multiple of what these need, if you want to quantize: {', '.join(refused)}."
