"""Hints for options as other tools name them, and for values that belong to another option."""

from __future__ import annotations

import re
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


_NO_NUMBER = re.compile(r"'(.*)' is not a valid (?:float|integer)")


def with_hint(error: click.UsageError) -> click.UsageError:
    """The error, or one that also says what to write instead, where that is known."""
    if isinstance(error, click.NoSuchOption):
        return _with_name(error)
    hint = _number_hint(error) if isinstance(error, click.BadParameter) else _list_hint(error)
    if hint is None:
        return error
    message = f"{error.message.rstrip('.')}. {hint}"
    if isinstance(error, click.BadParameter):
        return click.BadParameter(message, error.ctx, error.param, error.param_hint)
    return click.UsageError(message, error.ctx)


def _number_hint(error: click.BadParameter) -> str | None:
    """How to write a number that was given with a unit; None where it is not known."""
    found, option = _NO_NUMBER.match(error.message), error.param
    if found is None or not isinstance(option, click.Option):
        return None
    number, unit = _split(found[1])
    if option.name is not None and option.name.endswith("_gib"):
        wanted = number if number is not None and unit in ("g", "gb", "gib") else 24
        return f"It is a number of GiB: write {option.opts[-1]} {wanted:g}."
    if number is not None and option.type is click.INT and unit == "k":
        return f"Write the whole number: {option.opts[-1]} {number * 1024:.0f}."
    if number is not None and unit == "%":
        return f"It is a share: write {option.opts[-1]} {number / 100:g}."
    return None


def _split(text: str) -> tuple[float | None, str]:
    """A number and its unit, in small letters; None if it does not begin with a number."""
    found = re.match(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(.*?)\s*$", text, re.DOTALL)
    return (float(found[1]), found[2].lower()) if found is not None else (None, "")


def _list_hint(error: click.UsageError) -> str | None:
    """How to give several values to an option that was given, where words are left over; None if there is none."""
    context = error.ctx
    if context is None or not error.message.startswith("Got unexpected extra argument"):
        return None
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        if not isinstance(option, click.Option) or not given:
            continue
        name = option.opts[-1]
        if option.multiple:
            return f"{name} takes one value. For several write it again: {name} A {name} B."
        if option.metavar is not None and option.metavar.endswith(",…"):
            return f"{name} takes one word. Write several values with commas: {name} {option.metavar}."
    return None


def _with_name(error: click.NoSuchOption) -> click.UsageError:
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
