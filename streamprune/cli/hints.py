"""Hints for options as other tools name them, and for values that belong to another option."""

from __future__ import annotations

from typing import Any

import click

from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.targets import WEIGHTS

#: What another tool's option is called here: the option, and how to write it. For each command the first that it has.
_RATIO = (("--ratio", "--ratio R, the share of experts to remove (--ratio 0.5: half)"),)
_KEEP = (("--keep", "--keep N, the experts to keep in every layer"),)
_TEXT = (("--calibration", "--calibration TEXT, a recipe or files"), ("--data", "--data TEXT, a recipe or files"))
_FORMAT = (
    ("--gguf", "--weights FORMAT for what streamprune writes, --gguf TYPE to plan for what llama.cpp makes of it"),
    ("--weights", "--weights FORMAT"),
)
_MEMORY = (("--budget-gib", "--budget-gib G, or --gpu NAME"),)
_CONTEXT = (("--context", "--context TOKENS"), ("--seq-len", "--seq-len TOKENS"))
_OUTPUT = (("--output", "-o FOLDER"),)
_SAMPLES = (("--samples", "--samples N"),)
_HINTS = {
    **dict.fromkeys(
        ("--compression-ratio", "--compression", "--prune-ratio", "--pruning-ratio", "--sparsity", "--prune"), _RATIO
    ),
    **dict.fromkeys(
        ("--experts", "--num-experts", "--n-experts", "--keep-experts", "--num-experts-to-keep", "--n-keep"), _KEEP
    ),
    **dict.fromkeys(("--dataset", "--dataset-name", "--calibration-data", "--calib", "--calib-data"), _TEXT),
    **dict.fromkeys(("--quant", "--quantization", "--qtype", "--outtype", "--format", "--wbits"), _FORMAT),
    **dict.fromkeys(("--vram", "--memory", "--max-memory", "--budget", "--vram-budget", "--gpu-memory"), _MEMORY),
    **dict.fromkeys(("--ctx", "--ctx-size", "--max-model-len", "--context-length", "--n-ctx"), _CONTEXT),
    **dict.fromkeys(("--output-dir", "--out", "--outdir", "--save-dir", "--save-path"), _OUTPUT),
    **dict.fromkeys(("--num-samples", "--nsamples", "--n-samples", "--num-calibration-samples"), _SAMPLES),
}


def with_hint(error: click.NoSuchOption) -> click.UsageError:
    """The error, or one that says what the option is called here, if other tools have it and the command too."""
    command = error.ctx.command if error.ctx is not None else None
    known = {name for parameter in command.params for name in parameter.opts} if command is not None else set()
    name = error.option_name.lower().replace("_", "-")
    hint = next((text for option, text in _HINTS.get(name, ()) if option in known), None)
    if name in ("--model", "--model-name", "--model-path") and command is not None:
        hint = "MODEL stands without an option, right after the command"
    if hint is None:
        return error
    return click.UsageError(f"No such option: {error.option_name}. Here it is {hint}.", error.ctx)


class WeightsChoice(click.Choice[str]):
    """--weights, which names the option for llama.cpp's quantizations where one of these is given."""

    def __init__(self) -> None:
        super().__init__(WEIGHTS)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        """One of WEIGHTS. Fails with the option that is meant for one of GGUF_TYPES."""
        # (Both have a BF16.)
        if value not in WEIGHTS and str(value).upper() in GGUF_TYPES:
            self.fail(f"{value} is a quantization of llama.cpp: write --gguf {value.upper()}.", parameter, context)
        return super().convert(value, parameter, context)
