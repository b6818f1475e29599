"""The report's summary in sentences, and the commands that serve a model: for those who only look. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamprune.fit.engine_rules import NAMES, Served
from streamprune.fit.engines import refusal
from streamprune.fit.positions import max_positions
from streamprune.fit.verdict import verdict
from streamprune.hardware.gpus import GPUS
from streamprune.hardware.memory import format_bytes
from streamprune.models.config_json import ExpertSpec, expert_spec, stated_shape, text_part
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.reporting.evaluations import TextResult
from streamprune.reporting.facts import Facts, Memory
from streamprune.reporting.record import Record
from streamprune.tables import interval, number, percent
from streamprune.targets import ServingSpec

#: The names of dtypes in convert_hf_to_gguf.py.
_GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def share_removed(record: Record) -> float:
    """The share of the experts' weights that was removed, whole experts and channels, from 0 to 1."""
    kept = sum(record.counts.values()) / record.all_experts
    width, full = record.settings.width, record.source.width
    return 1 - kept * (width / full if width is not None and full else 1.0)


def summary_sentences(facts: Facts) -> Iterator[str]:
    """What was removed, what was lost, and where it fits."""
    share = share_removed(facts.record)
    yield verdict(share) or "Nothing of the experts was removed: only how weights are stored has changed."
    yield _lost(facts.text)
    if isinstance(facts.memory, Memory):
        yield _fits(facts.memory)


def _lost(text: TextResult | None) -> str:
    found = text.all if text is not None else None
    if text is None or found is None:
        return "What was lost was not measured: `streamprune eval` does it, and makes this report again."
    said = f"On {text.text_words} its loss is {number(found.loss)} nats per token"
    if found.original_loss is None:
        return f"{said}; that of the original was not measured (`--against`)."
    said += f" ({text.original_words}: {number(found.original_loss)})"
    if found.kl is not None:
        said += f", its KL divergence {number(found.kl)}"
        said += f" ({interval(found.kl_interval)})" if found.kl_interval is not None else ""
    if found.top1_agreement is not None:
        said += f", and its likeliest next token is the same in {percent(found.top1_agreement)} of the places"
    return f"{said}."


def _fits(memory: Memory) -> str:
    total, use = memory.after.total, memory.after.use
    quantized = f" as {use.weights}" if use.weights in GGUF_TYPES else ""
    said = f"To serve {use.batch} x {use.context:,} tokens{quantized} it takes about {format_bytes(total)}"
    large = sorted((gpu for gpu in GPUS if gpu.usable_bytes >= total), key=lambda gpu: gpu.usable_bytes)
    if not large:
        return f"{said}: no single GPU that is known by name has so much."
    others = f", and {len(large) - 1} other known GPUs" if len(large) > 1 else ""
    return f"{said}: it fits {large[0].key} (CUDA can use {format_bytes(large[0].usable_bytes)}){others}."


@dataclass(frozen=True)
class Program:
    """A program that may serve a model: `commands` that do, or, where it does not take the model, why (`refusal`)."""

    name: str
    commands: str = ""
    refusal: str = ""


def as_served(record: Record, config: Mapping[str, Any]) -> Served:
    """The model as an engine meets it, by its record and its config.json."""
    source, width, shape = record.source, record.settings.width, stated_shape(config)
    spec = expert_spec((), "", source.experts, (text_part(config)[1],))
    return Served(
        spec or ExpertSpec((), "", source.experts, source.top_k),
        tuple(sorted(set(record.counts.values()))),
        record.settings.weights or "source",
        width or (shape.expert if shape is not None else 0) or None,
        config=config,
    )


def serving_programs(served: Served, use: ServingSpec) -> list[Program]:
    """How vLLM and llama.cpp serve the model in the current folder, or why they cannot.

    `use` is what it was planned for. Empty where its layers keep different numbers of experts, which neither takes.
    """
    if len(served.counts) > 1:
        return []
    use = replace(use, context=min(use.context, max_positions(served.config) or use.context))
    commands = {
        "vllm": f"vllm serve . --max-model-len {use.context}",
        "llama.cpp": "\n".join(gguf_commands(served.config, use, Path(), "model")),
    }
    if use.weights in GGUF_TYPES:
        # Planned for llama.cpp's quantization, more may be left than another engine has room for.
        del commands["vllm"]
    found = []
    for engine, command in commands.items():
        why_not = refusal(served, engine)
        found.append(Program(NAMES[engine], refusal=why_not) if why_not else Program(NAMES[engine], command))
    return found


def gguf_commands(
    config: Mapping[str, Any], use: ServingSpec, folder: Path, name: str, imatrix: Path | None = None
) -> Iterator[str]:
    """The commands of llama.cpp that convert the model in `folder`, quantize it as planned, and serve it.

    The files of the model get this name and a suffix; `imatrix` is the importance matrix for the quantization.
    """
    model = shlex.quote(f"{name}.gguf")
    yield (
        f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(str(folder))} --outfile {model} --outtype "
        f"{gguf_outtype(config)}"
    )
    if use.weights in GGUF_TYPES:
        plain, model = model, shlex.quote(f"{name}-{use.weights}.gguf")
        given = f"--imatrix {shlex.quote(str(imatrix))} " if imatrix is not None else ""
        yield f"llama-quantize {given}{plain} {model} {use.weights}"
    yield f"llama-server -m {model} -c {use.context * use.batch}"


def gguf_outtype(config: Mapping[str, Any]) -> str:
    """The value of --outtype that keeps the weights as config.json says they are."""
    named = (str(part.get(name)) for part in (text_part(config)[1], config) for name in ("dtype", "torch_dtype"))
    return next((_GGUF_TYPES[dtype] for dtype in named if dtype in _GGUF_TYPES), "auto")
