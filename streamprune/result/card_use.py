"""What the model card tells for using the model: how to load it, what was not tested, how it is made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streamprune.fit.footprint import max_positions
from streamprune.output.plan import PrunePlan
from streamprune.output.uneven import engines_note, is_uneven
from streamprune.result.markdown import block, plain
from streamprune.result.reproduce import THIS_MODEL, reproduce_command, scores_again
from streamprune.settings import MOST_TOKENS

_FOLDER = "path/to/this/folder"
#: How convert_hf_to_gguf.py calls the dtypes that models have.
_GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def use_lines(plan: PrunePlan, report: Mapping[str, Any]) -> Iterator[str]:
    """How to load the model in transformers, and in the engines that can load it."""
    uneven = is_uneven(plan.counts)
    yield from ("## Use", "")
    if plan.layout.dropped:
        yield f"The source's {len(plan.layout.dropped)} multi-token-prediction tensors were left out."
        yield ""
    if uneven:
        yield from (engines_note(uneven), "")
    trust = ", trust_remote_code=True" if uneven else ""
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{_FOLDER}", dtype="auto", device_map="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{_FOLDER}")'
    )
    yield from ("With transformers:", "", *block(load, "python"))
    if uneven:
        return
    context = min(report["use"]["context"], max_positions(plan.config) or MOST_TOKENS)
    yield from ("With vLLM, where it knows the source's architecture:", "")
    yield from block(f"vllm serve {_FOLDER} --max-model-len {context}", "bash")
    yield from ("With llama.cpp, where it knows the source's architecture:", "")
    kind = _GGUF_TYPES.get(str(report["settings"].get("dtype")), "auto")
    yield from block(
        f"python convert_hf_to_gguf.py {_FOLDER} --outfile model.gguf --outtype {kind}\n"
        f"llama-server -m model.gguf -c {context}",
        "bash",
    )


def untested_lines(plan: PrunePlan, report: Mapping[str, Any]) -> Iterator[str]:
    """What nobody should take for granted."""
    yield from ("## What was not tested", "")
    yield "As this card was written (what was measured since, if anything, stands at its end):"
    yield ""
    yield "- No benchmark, and no text generated with this model."
    if report["calibration"] is None:
        yield "- Nothing at all was run on the source or on this model: the experts were chosen by hand."
    else:
        yield "- Languages, domains and tasks of which the calibration text has nothing."
        longest = _longest(report)
        if longest is not None:
            yield f"- Contexts longer than the {longest:,} tokens of the calibration's sequences."
    engines = "transformers has not" if is_uneven(plan.counts) else "neither transformers nor vLLM nor llama.cpp has"
    yield f"- The commands above: {engines} loaded these very files."
    yield "- Safety: refusals, bias and what else the source was aligned for may have changed."
    yield "- Chat, tool calls and long answers, which may suffer where perplexity still looks well."
    yield ""


def reproduce_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The command that makes the same files again, and what has to be the same for that."""
    yield from ("## How to reproduce", "")
    again = scores_again(report)
    if again:
        yield "From the source model and the calibration text:"
    else:
        yield f"From the source model and the files of this one, in a folder `{THIS_MODEL}`:"
    yield ""
    yield from block(reproduce_command(report), "bash")
    named = (f"{plain(name)} {plain(version)}" for name, version in report["versions"].items())
    yield f"With {', '.join(named)}."
    if again:
        yield (
            "Local files go by their names without folders. On processors or cards of the same kind, with as many "
            "threads, the files are the same to the byte, but for `report.html` and what it adds to this card; on "
            "others the last digits of the scores may differ."
        )
    yield ""


def _longest(report: Mapping[str, Any]) -> int | None:
    recipe = report["calibration"].get("recipe")
    length = recipe.get("sequence_length") if isinstance(recipe, dict) else None
    return length if type(length) is int else None
