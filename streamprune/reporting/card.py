"""Names from strangers in Markdown: whatever is in them, they stay a piece of text.

What the model card tells of the choice: the experts of each block, the calibration, what is kept, the scores.

The one command that makes a pruned model again, told from its record.

What the model card tells for using the model: how to load it, what was not tested, how it is made again.

The model card (README.md) that goes with a pruned model, with metadata as the Hub expects it.

It is made of the run's record alone, so that the same input and settings give the same card to the byte. What is
measured of the model later is added at its end.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamprune.checkpoint.index import Checkpoint
from streamprune.config import DEFAULT_CONTEXT, DEFAULT_SHARD_BYTES, DTYPES, MOST_TOKENS
from streamprune.errors import SettingsError
from streamprune.fit.estimate import Estimate, Fit
from streamprune.fit.footprint import max_positions
from streamprune.hardware.memory import format_bytes
from streamprune.models.per_layer_experts import engines_note, has_per_layer_experts
from streamprune.output.plan import PrunePlan
from streamprune.saliency.methods import METHODS
from streamprune.selection.retention import Retention
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.settings import SelectionSettings

#: No real name is longer.
_LONGEST = 300


def plain(text: object) -> str:
    """A stranger's text on one line, without characters that cannot be seen."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else "?" for char in line)[:_LONGEST]


def code(text: object) -> str:
    """A stranger's text as inline code, also within a table."""
    line = plain(text).replace("|", "\\|") or " "
    # A fence longer than any within it. (CommonMark takes off one space at either side.)
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def words(text: object) -> str:
    """A stranger's text as words, with nothing in it that Markdown or HTML takes for more."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", plain(text))


def block(text: str, language: str = "") -> Iterator[str]:
    """Lines with a block of code, whatever is in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    yield from (f"{fence}{language}", text, fence, "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with a table; the cells are Markdown already."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


#: What a recipe may say of where a source is from, in the order in which it is told.
_PLACES = ("dataset", "subset", "split", "commit", "data_files", "data_dir", "path", "builtin")


def experts_lines(plan: PrunePlan) -> Iterator[str]:
    """How many experts each block keeps, equal neighbours taken together."""
    spec, counts, layout = plan.layout.spec, plan.counts, plan.layout
    yield from ("## Experts per block", "")
    dense = layout.layer_count - len(counts)
    others = f" The other {dense} blocks have no experts to choose from." if dense else ""
    if len(set(counts.values())) == 1:
        which = "Every block" if not dense else f"Each of the blocks {_ranges(sorted(counts))}"
        yield f"{which} keeps {next(iter(counts.values()))} of {spec.count} experts.{others}"
        yield ""
        return
    yield f"Blocks, counted from 0, keep different numbers of their {spec.count} experts.{others}"
    yield ""
    rows = []
    for count, group in itertools.groupby(sorted(counts), key=lambda block: counts[block]):
        rows.append((_ranges(list(group)), str(count), f"{count / spec.count:.0%}"))
    yield from table(("blocks", "experts", "of the source's"), rows)


def calibration_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The text that the experts were scored on: by source its origin, its size and its share."""
    calibration, mix = report["calibration"], report["settings"]["mix"]
    if calibration is None:
        return
    recipe = _mapping(calibration.get("recipe"))
    yield from ("## Calibration", "")
    named = f" Recipe {code(recipe['name'])}: {_sentence(recipe)}" if isinstance(recipe.get("name"), str) else ""
    yield f"{calibration['sequences']:,} sequences, {calibration['tokens']:,} tokens.{named}{_form(recipe)}"
    yield ""
    made = {
        each.get("name"): each for each in recipe.get("sources", []) if isinstance(each, dict)
    } if isinstance(recipe.get("sources"), list) else {}  # fmt: skip
    rows = []
    for source in calibration["sources"]:
        facts = _mapping(made.get(source["name"]))
        share = source["tokens"] / calibration["tokens"] if calibration["tokens"] else 0.0
        sizes = [_number(facts.get("records")), _number(facts.get("sequences")), _number(source["tokens"])]
        rows.append((code(source["name"]), _place(facts), *sizes, f"{share:.1%}"))
    yield from table(("source", "from", "records", "sequences", "tokens", "share"), rows)
    if mix:
        shares = ", ".join(f"{code(name)} {share:.1%}" for name, share in mix.items())
        yield from (f"For the choice the sources were weighed anew, by tokens: {shares}.", "")
    yield (
        "What the calibration text does not contain, the model may have lost: compare it with the source on your own "
        "tasks before you rely on it."
    )
    unseen = [layer for layer in report["layers"] if not all(layer["counts"])]
    if unseen:
        yield ""
        yield f"In {len(unseen)} blocks the calibration text never used some experts; they count as the least useful."
    yield ""


def retention_lines(retained: Sequence[Retention]) -> Iterator[str]:
    """What the choice keeps of each source's saliency."""
    if not retained:
        return
    yield from ("## Domain retention", "")
    yield (
        "The share of its saliency (the sum of router weight times output norm over a source's own tokens, all blocks "
        "together) that each source keeps, and the most that as many experts chosen for it alone would keep. It tells "
        "what the choice favours; it is no measurement of the pruned model."
    )
    yield ""
    rows = [
        (code(each.source), f"{each.kept:.1%}", f"{each.best:.1%}", f"{each.worst:.1%} (block {each.worst_layer})")
        for each in retained
    ]
    yield from table(("source", "kept", "at best", "least in a block"), rows)


def scores_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What the files beside the weights hold, and what can be done with them."""
    yield from ("## Scores", "")
    text = "`streamprune.json` lists, for each block, the experts kept (by their number in the source)"
    if report["calibration"] is None:
        yield from (f"{text}. They were chosen by hand, without scores.", "")
        return
    yield (
        f"{text}, and the score and token count of every expert. `scores/` holds what all scores are computed from, "
        "apart for each source of the calibration. With it, other sizes, mixes, methods and schedules take the time of "
        "a file copy and no GPU: look at them with `streamprune inspect`, and write them from the source model with "
        "`streamprune prune SOURCE --scores THIS_MODEL`."
    )
    yield ""


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, those that follow one another as a range: 0, 3–7."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)


def _sentence(recipe: Mapping[str, Any]) -> str:
    text = plain(recipe.get("description") or "").rstrip(".")
    return f"{words(text)}." if text else "without a description."


def _form(recipe: Mapping[str, Any]) -> str:
    mode, length = recipe.get("mode"), recipe.get("sequence_length")
    forms = {
        "packed": "Documents laid end to end and divided into sequences of",
        "documents": "Each document a sequence of its own, cut at",
        "bucketed": "Each document a sequence of its own, its length rounded down, cut at",
    }
    form = forms.get(mode) if isinstance(mode, str) else None
    return f" {form} {length:,} tokens." if form and type(length) is int else ""


def _place(facts: Mapping[str, Any]) -> str:
    told = []
    for key in _PLACES:
        value = facts.get(key)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if isinstance(value, str) and value:
            told.append(code(value) if key in ("dataset", "path") else f"{key} {code(value)}")
    return ", ".join(told) or "–"


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "–"


def _mapping(value: Any) -> Mapping[str, Any]:
    """What a stranger's scores tell, if it is of that kind."""
    return value if isinstance(value, dict) else {}


#: What a published model is called in commands that need its files.
THIS_MODEL = "this-model"


def scores_again(report: Mapping[str, Any]) -> bool:
    """Whether `streamprune run` makes the model again. Else its own scores and record are needed: the choice was made
    by hand, or from scores of which the record does not tell all."""
    settings = report["settings"]
    given = _given(report)
    if settings["method"] is None or given is None or settings.get("propagate") != "original":
        # (Scores that were taken with --propagate pruned may have been used for another choice than the run's own.)
        return False
    # One --seed stands for the calibration and the random method alike.
    return bool(settings["method"] != "random" or settings["seed"] == (given["seed"] or 0))


def reproduce_command(report: Mapping[str, Any]) -> str:
    """The command that writes the same model, to the byte, from the same source model and calibration text.

    Local files go by the names that they had, without folders; where `scores_again` is False the files of the model
    itself are in the folder THIS_MODEL.
    """
    settings = report["settings"]
    model = str(settings["model"])
    again = scores_again(report)
    parts = ["streamprune", "run" if again else "prune", model, "-o", f"{model.rpartition('/')[2]}-pruned"]
    if settings["revision"] is not None:
        parts += ["--revision", str(settings["revision"])]
    if not again and report["calibration"] is not None:
        parts += ["--scores", THIS_MODEL]
    if settings["method"] is None:
        parts += ["--keep-file", f"{THIS_MODEL}/streamprune.json"]
    else:
        parts += [*_goal(report), *_selection(settings, again)]
    parts += _use(report["use"])
    if again:
        parts += _scoring(report)
    if settings["max_shard_bytes"] != DEFAULT_SHARD_BYTES:
        parts += ["--max-shard-size", str(settings["max_shard_bytes"])]
    return shlex.join(parts)


def _goal(report: Mapping[str, Any]) -> Iterator[str]:
    settings, budget = report["settings"], report["use"]["budget_bytes"]
    if budget is not None:
        # Bytes divided by a power of two: the number comes back the same.
        yield from ("--budget-gib", repr(budget / 2**30).removesuffix(".0"))
    elif settings["schedule"] in SCHEDULES:
        yield from ("--keep", str(settings["total"] // len(report["layers"])))


def _selection(settings: Mapping[str, Any], again: bool) -> Iterator[str]:
    if settings["method"] != "reap":
        yield from ("--method", settings["method"])
    if settings["method"] == "random" and settings["seed"] and not again:
        yield from ("--seed", str(settings["seed"]))
    if settings["mix"] is not None:
        yield from ("--mix", _mix_text(settings["mix"]))
    if settings["schedule"] != "uniform":
        yield from ("--schedule", settings["schedule"])
    if settings["spread"] is not None:
        yield from ("--spread", repr(settings["spread"]))
    if settings["floor"] is not None:
        yield from ("--floor", str(settings["floor"]))
    if settings["protect_super_experts"]:
        yield "--protect-super-experts"


def _mix_text(shares: Mapping[str, float]) -> str:
    """The mix that gives just these shares: as simple numbers if they do, else with all their digits."""
    fractions = {name: Fraction(share).limit_denominator(1000) for name, share in shares.items()}
    common = math.lcm(*(each.denominator for each in fractions.values()))
    texts = [
        ",".join(f"{name}={share * common}" for name, share in fractions.items()),
        ",".join(f"{name}={share!r}" for name, share in shares.items()),
    ]
    return next((text for text in texts if _shares(text) == dict(shares)), texts[-1])


def _shares(mix: str) -> dict[str, float] | None:
    try:
        return SelectionSettings(mix=mix).shares
    except SettingsError:
        # All shares too small for such a denominator.
        return None


def _use(use: Mapping[str, Any]) -> Iterator[str]:
    if use["context"] != DEFAULT_CONTEXT:
        yield from ("--context", str(use["context"]))
    if use["batch"] != 1:
        yield from ("--batch", str(use["batch"]))
    if use["kv_dtype"] != "auto":
        yield from ("--kv-dtype", str(use["kv_dtype"]))


def _scoring(report: Mapping[str, Any]) -> Iterator[str]:
    given, settings = _given(report), report["settings"]
    assert given is not None  # as `scores_again` found
    for text in given["calibration"]:
        yield from ("--calibration", text)
    for option in ("samples", "seq_len", "seed"):
        if given[option] is not None:
            yield from (f"--{option.replace('_', '-')}", str(given[option]))
    if report["calibration"].get("held_back"):
        # What is measured on is not scored on.
        yield "--evaluate"
    # The last digits of the scores depend on these; a card or a processor of another kind may round otherwise still.
    if settings.get("dtype") in DTYPES:
        yield from ("--dtype", settings["dtype"])
    if settings.get("device") in ("cpu", "cuda"):
        yield from ("--device", settings["device"])
    if type(settings.get("batch_tokens")) is int:
        yield from ("--batch-tokens", str(settings["batch_tokens"]))


def _given(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was given on the command line for the calibration; None where the record, which may be a stranger's, does
    not tell it, or tells what cannot be."""
    recipe = (report["calibration"] or {}).get("recipe")
    given = recipe.get("given") if isinstance(recipe, dict) else None
    if not isinstance(given, dict):
        return None
    names = given.get("calibration")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    numbers = {name: given.get(name) for name in ("samples", "seq_len", "seed")}
    if not all(number is None or type(number) is int for number in numbers.values()):
        return None
    return {"calibration": names, **numbers}


_FOLDER = "path/to/this/folder"
#: How convert_hf_to_gguf.py calls the dtypes that models have.
_GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def use_lines(plan: PrunePlan, report: Mapping[str, Any]) -> Iterator[str]:
    """How to load the model in transformers, and in the engines that can load it."""
    uneven = has_per_layer_experts(plan.counts)
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
    engines = (
        "transformers has not"
        if has_per_layer_experts(plan.counts)
        else "neither transformers nor vLLM nor llama.cpp has"
    )
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


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def model_card(
    plan: PrunePlan,
    report: Mapping[str, Any],
    source: Checkpoint,
    estimate: Estimate | None = None,
    retained: Sequence[Retention] = (),
) -> str:
    """The card's text, made of the run's report (`streamprune.json`) and the source's own card, if it has one.

    `estimate` is the memory that the written model takes, None where it cannot be told; `retained` what the choice
    keeps of each source of the calibration, empty without scores.
    """
    model = str(report["settings"]["model"])
    sections = [
        *_summary(plain(model).rpartition("/")[2], plan, report, source.nbytes),
        *experts_lines(plan),
        *calibration_lines(report),
        *retention_lines(retained),
        *(_memory(estimate) if estimate else []),
        *use_lines(plan, report),
        *scores_lines(report),
        *untested_lines(plan, report),
        *reproduce_lines(report),
    ]
    return f"---\n{_metadata(model, report, source.folder).to_yaml()}\n---\n\n" + "\n".join(sections)


def _metadata(model: str, report: Mapping[str, Any], source: Path) -> ModelCardData:
    """The card's metadata. (The Hub knows base_model_relation as adapter, merge, quantized or finetune; a pruned model
    is none of them.)"""
    inherited = _source_metadata(source)
    base = model if _HUB_ID.fullmatch(model) else _texts(inherited.get("base_model"), _HUB_ID)
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=_text(inherited.get("pipeline_tag")) or "text-generation",
        license=_texts(inherited.get("license")),
        license_name=_text(inherited.get("license_name")),
        license_link=_text(inherited.get("license_link")),
        language=_texts(inherited.get("language")),
        tags=["mixture-of-experts", "moe", "pruning", "expert-pruning", "streamprune", *_method_tags(report)],
    )


def _method_tags(report: Mapping[str, Any]) -> list[str]:
    return ["reap"] if report["settings"]["method"] == "reap" else []


def _source_metadata(source: Path) -> dict[str, Any]:
    """The metadata of the source's own model card; empty if there is none that can be read."""
    try:
        return dict(ModelCard.load(source / "README.md", ignore_metadata_errors=True).data.to_dict())
    except Exception:
        # People write anything into their cards; a card that cannot be parsed says nothing.
        return {}


def _text(value: Any) -> str | None:
    """A stranger's text, on one line, if it is one. YAML reads `no` as False, which as a language is Norwegian."""
    if value is False:
        value = "no"
    return (plain(value) or None) if isinstance(value, str) else None


def _texts(value: Any, pattern: re.Pattern[str] | None = None) -> Any:
    """The same of a text or a list of them: those that are of the pattern. None where nothing is left."""
    found = [text for each in (value if isinstance(value, list) else [value]) if (text := _text(each)) is not None]
    found = [text for text in found if pattern is None or pattern.fullmatch(text)]
    if not found:
        return None
    return found if isinstance(value, list) else found[0]


def _score_meaning(method: str) -> str:
    """What a method's score of an expert is, and where it was published."""
    entry = METHODS[method]
    linked = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.publication)
    return f"{entry.meaning} ({linked})" if linked else entry.meaning


def _summary(name: str, plan: PrunePlan, report: Mapping[str, Any], source_bytes: int) -> Iterator[str]:
    spec, counts = plan.layout.spec, list(plan.counts.values())
    least, most, all_of_them = min(counts), max(counts), spec.count * len(counts)
    per_block = str(most) if least == most else f"{least} to {most}"
    kept = f"{most} of {spec.count}" if least == most else f"{sum(counts):,} of {all_of_them:,}"
    yield from (f"# {words(name)}, {kept} experts", "")
    yield (
        f"Made from {_origin(report)} with streamprune "
        f"{plain(report['versions']['streamprune'])}: of the experts in its {len(counts)} Mixture-of-Experts blocks, "
        f"{all_of_them - sum(counts):,} were removed{_by_what(report)}. Every tensor that stays is identical to the "
        "source's, byte for byte; nothing was retrained."
    )
    yield ""
    if report["settings"]["method"] is not None:
        yield from (f"An expert's score is {_score_meaning(report['settings']['method'])}.", "")
    rows = [
        ("experts per block", str(spec.count), per_block),
        ("experts in all", f"{all_of_them:,}", f"{sum(counts):,}"),
        ("experts used per token", str(spec.top_k), str(spec.top_k)),
        ("weights", format_bytes(source_bytes), format_bytes(plan.output_bytes)),
    ]
    yield from table(("", "source", "this model"), rows)


def _origin(report: Mapping[str, Any]) -> str:
    model, revision = report["settings"]["model"], report["settings"]["revision"]
    return code(model) + (f" (revision {code(revision)})" if revision is not None else "")


def _by_what(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    if settings["method"] is None:
        return ", chosen by hand"
    text = f": those with the lowest {settings['method']} score"
    text += " of all blocks together" if settings["schedule"] == "global" else " in each block"
    if settings["schedule"] not in ("global", "uniform"):
        text += f" (schedule {words(settings['schedule'])})"
    return text + (", super experts excepted" if settings["protect_super_experts"] else "")


def _memory(estimate: Estimate) -> Iterator[str]:
    use = estimate.use
    low, high = estimate.interval
    yield from ("## Memory", "")
    yield f"Predicted from the files of this model, for {use.batch} x {use.context:,} tokens on one card:"
    yield ""
    total = (f"**{format_bytes(estimate.total)}**", f"{format_bytes(low)} to {format_bytes(high)}")
    rows = [(term.name, format_bytes(term.bytes), term.kind) for term in estimate.terms]
    yield from table(("part", "size", ""), [*rows, ("**total**", *total)])
    if isinstance(estimate, Fit):
        yield from (f"Pruned for a budget of {format_bytes(estimate.budget)}.", "")
