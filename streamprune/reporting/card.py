"""The model card (README.md) of a pruned model, with metadata as the Hub expects it, and the command to reproduce it.

The card is made from the run's record alone, so that the same input and settings give a byte-identical card. Later
measurements are added at its end (`write`). The text is in `templates/card.md.j2`. No torch.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.safetensors_file import DTYPE_BITS
from streamprune.common_settings import DEFAULT_SHARD_BYTES, DTYPES
from streamprune.config import NO_ANCHOR
from streamprune.errors import SettingsError
from streamprune.fit.estimate import Estimate, Fit
from streamprune.fit.verdict import verdict
from streamprune.formats.base import KeptExperts
from streamprune.models.per_layer_experts import engines_note, has_per_layer_experts
from streamprune.output.plan import REPORT_NAME, PrunePlan
from streamprune.reporting.record import Record
from streamprune.reporting.record_text import Calibration, GivenCalibration, Recipe, RecipeSource
from streamprune.reporting.summary import as_served, serving_programs, share_removed
from streamprune.reporting.tables import refit_table
from streamprune.reporting.templates import render
from streamprune.saliency.methods import DEFAULT_METHOD, METHODS
from streamprune.selection.retention import Retention
from streamprune.selection.schedules import DEFAULT_SCHEDULE, SCHEDULES
from streamprune.selection.settings import SelectionSettings
from streamprune.selection.widths import is_aligned, width_notes
from streamprune.tables import plain
from streamprune.targets import DEFAULT_CONTEXT, ServingSpec

#: The name of the published model's folder in commands that need its files.
THIS_MODEL = "this-model"
#: Default values of options, which are omitted from a command.
_USUAL = {
    "--method": DEFAULT_METHOD,
    "--schedule": DEFAULT_SCHEDULE,
    "--context": DEFAULT_CONTEXT,
    "--batch": 1,
    "--kv-dtype": "auto",
    "--max-shard-size": DEFAULT_SHARD_BYTES,
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: The keys of a recipe that say where a source is from, in the order in which the card shows them.
_PLACES = ("dataset", "subset", "split", "commit", "data_files", "data_dir", "path", "builtin")


def model_card(
    plan: PrunePlan,
    record: Record,
    source: Checkpoint,
    estimate: Estimate | None = None,
    kept_of_sources: tuple[Sequence[Retention], Sequence[Retention]] = ((), ()),
    searched: bool = False,
) -> str:
    """The card's text, made of the run's record and the source's own card, if it has one.

    `estimate` is the memory of the written model, None if it cannot be estimated; `kept_of_sources` is how much
    saliency of each calibration source the selection keeps, empty without scores, and the same of the channels' energy,
    empty unless experts become narrower. `searched`: the scores are those of a search.
    """
    settings, calibration = record.settings, record.calibration
    retained, energy = kept_of_sources
    recipe = calibration.stated if calibration else Recipe()
    stated = {each.name: each for each in recipe.sources}
    return render(
        "card.md.j2",
        metadata=metadata(settings.model, _kinds(record), source.folder).to_yaml(),
        name=plain(settings.model).rpartition("/")[2],
        record=record,
        plan=plan,
        recipe=recipe,
        experts_by_layers=_by_number(record.counts),
        layers=ranges(sorted(record.counts)),
        method=_score_meaning(settings.method) if settings.method and record.removes_experts else None,
        width_name=plan.layout.width.names[0] if plan.layout.width is not None else "",
        notes=_notes(record, plan),
        loading_options=_loading_options(record, plan),
        source_bytes=source.nbytes,
        stated_of=lambda name: stated.get(name, RecipeSource(name)),
        place_of=_origin,
        layers_with_unseen=sum(0 in layer.counts for layer in record.layers),
        retained=retained if record.removes_experts else (),
        energy=energy,
        refit_table=refit_table,
        estimate=estimate,
        budget=estimate.budget if isinstance(estimate, Fit) else None,
        engines=engines_note(True) if has_per_layer_experts(plan.counts) else None,
        programs=serving_programs(as_served(record, plan.config), _use_of(record)),
        verdict=verdict(share_removed(record)),
        imatrix_file=shlex.quote(record.imatrix.file) if record.imatrix else "",
        searched=searched,
        again=can_score_again(record),
        reads_text=record.needs_text or can_score_again(record),
        this_model=THIS_MODEL,
        command=reproduce_command(record),
        versions=", ".join(f"{plain(name)} {plain(version)}" for name, version in record.versions.items()),
    )


def _by_number(counts: Mapping[int, int]) -> list[tuple[str, int]]:
    """Ranges of layers that keep the same number of experts, in the order of the layers, and that number."""
    grouped = itertools.groupby(sorted(counts.items()), key=lambda item: item[1])
    return [(ranges([layer for layer, _ in layers]), number) for number, layers in grouped]


def _use_of(record: Record) -> ServingSpec:
    """The use that the model was planned for."""
    return record.use.spec if record.use else ServingSpec()


def _score_meaning(method: str) -> str:
    """The meaning of a method's score, and its publication, in Markdown."""
    entry = METHODS[method]
    linked = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.publication)
    return f"{entry.meaning} ({linked})" if linked else entry.meaning


def _notes(record: Record, plan: PrunePlan) -> Sequence[str]:
    """What kernels and formats will not like about the width of the experts, and what else is to know of the plan."""
    width = _new_width(record, plan)
    own = [record.mtp.layer] if record.mtp and record.mtp.layer else []
    kept = plan.layout.with_mtp({layer.index: KeptExperts(tuple(layer.kept)) for layer in [*record.layers, *own]})
    return [*(width_notes(*width) if width is not None else ()), *plan.notes_for(kept)]


def _new_width(record: Record, plan: PrunePlan) -> tuple[int, int] | None:
    """The width of narrower experts, and the bytes of each of their weights; None if they keep theirs."""
    width = record.settings.width
    bits = next((DTYPE_BITS[tensor.dtype] for tensor in plan.tensors if tensor.channels is not None), 0)
    return (width, bits // 8) if width is not None and bits else None


def _loading_options(record: Record, plan: PrunePlan) -> str:
    """What `from_pretrained` needs in addition, as Python."""
    own_code = ", trust_remote_code=True" if has_per_layer_experts(plan.counts) else ""
    width = _new_width(record, plan)
    return own_code + (', experts_implementation="eager"' if width is not None and not is_aligned(*width) else "")


def _kinds(record: Record) -> tuple[str, ...]:
    """Tags of what was done to the source."""
    removed = ("expert-pruning",) if record.removes_experts else ()
    narrower = ("width-pruning",) if record.settings.width is not None else ()
    return (*removed, *narrower, *(["reap"] if removed and record.settings.method == "reap" else []))


def metadata(model: str, kinds: Sequence[str], source: Path) -> ModelCardData:
    """The card's metadata; `kinds` are tags of what was done to the model.

    (The Hub knows base_model_relation as adapter, merge, quantized or finetune; a pruned model is none of them.)
    """
    try:
        inherited = ModelCard.load(source / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # Cards may contain anything; a card that cannot be parsed has no metadata.
        inherited = {}
    base = model if HUB_ID.fullmatch(model) else _texts(inherited.get("base_model"), HUB_ID)
    tags = ["mixture-of-experts", "moe", "pruning", *(kind for kind in kinds if kind != "reap"), "streamprune"]
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=_text(inherited.get("pipeline_tag")) or "text-generation",
        license=_texts(inherited.get("license")),
        license_name=_text(inherited.get("license_name")),
        license_link=_text(inherited.get("license_link")),
        language=_texts(inherited.get("language")),
        tags=[*tags, *(["reap"] if "reap" in kinds else [])],
    )


def _text(value: Any) -> str | None:
    """Untrusted text on one line; None for other values. (YAML reads the language `no`, Norwegian, as False.)"""
    if value is False:
        value = "no"
    return (plain(value) or None) if isinstance(value, str) else None


def _texts(value: Any, pattern: re.Pattern[str] | None = None) -> Any:
    """`_text` for a string or a list of strings: those that match the pattern. None if nothing is left."""
    found = [text for each in (value if isinstance(value, list) else [value]) if (text := _text(each)) is not None]
    found = [text for text in found if pattern is None or pattern.fullmatch(text)]
    if not found:
        return None
    return found if isinstance(value, list) else found[0]


def _origin(source: RecipeSource) -> str:
    """Where a source is from: "org/name, split train"."""
    found = []
    for key in _PLACES:
        value = getattr(source, key)
        text = ", ".join(value) if isinstance(value, list) else value
        if text:
            found.append(text if key in ("dataset", "path") else f"{key} {text}")
    return ", ".join(found)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, consecutive ones as a range: 0, 3–7."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)


def can_score_again(record: Record) -> bool:
    """Whether `streamprune run` makes the model again. Otherwise its own scores and record are needed: the selection
    was made by hand, or from scores that the record does not fully describe."""
    settings, given = record.settings, _given(record)
    if record.other_text is not None:
        # One run does not score on one text and compute weights from another.
        return False
    if settings.method is None or given is None or settings.propagate != "original":
        # (Scores made with --propagate pruned may have been used for another selection than the run's own.)
        return False
    # --seed sets both the calibration's seed and that of the random method.
    return settings.method != "random" or settings.seed == (given.seed or 0)


def _given(record: Record) -> GivenCalibration | None:
    text = _text_of_run(record)
    return text.stated.given if text else None


def _text_of_run(record: Record) -> Calibration | None:
    """The text that a run which makes the model reads: what weights are computed from, if the scores are of another."""
    return record.other_text or record.calibration


def reproduce_command(record: Record) -> str:
    """The command that writes a byte-identical model from the same source model and calibration text.

    Local files are given by name only, without folders; if `can_score_again` is False, the model's own files are in the
    folder THIS_MODEL.
    """
    settings, calibration, use = record.settings, _text_of_run(record), record.use
    given, again = _given(record), can_score_again(record)
    # Weights that are computed need their text, even if the scores are there.
    reads_text = again or record.needs_text
    is_by_hand = settings.method is None
    options: list[tuple[str, Any]] = [
        ("--revision", settings.revision),
        ("--scores", THIS_MODEL if not again and calibration else None),
        ("--keep-file", f"{THIS_MODEL}/{REPORT_NAME}" if is_by_hand and record.removes_experts else None),
        *(() if is_by_hand else _selection_options(record)),
    ]
    if use is not None:
        options += [
            ("--context", use.context),
            ("--batch", use.batch),
            ("--kv-dtype", use.kv_dtype),
            ("--gguf", use.gguf or None),
        ]
    if reads_text and given is not None and calibration is not None:
        options += _text_options(record, given, bool(calibration.held_back))
    if record.refit:
        anchor = record.refit.anchor
        options += [("--refit", True), ("--anchor", anchor.name if anchor is not None else NO_ANCHOR)]
    options += [
        ("--max-shard-size", settings.max_shard_bytes),
        ("--weights", settings.weights or None),
        ("--quantize", settings.quantize or None),
        ("--rounding", settings.rounding or None),
        ("--tensor-parallel", settings.tensor_parallel or None),
        ("--mtp", settings.mtp or None),
        # (Its text also counts for weights that are computed.)
        ("--imatrix", record.imatrix.file if record.imatrix and reads_text else None),
    ]
    words = ["streamprune", "run" if reads_text else "prune", settings.model]
    words += ["-o", f"{settings.model.rpartition('/')[2]}-pruned"]
    for name, value in options:
        if value is True:
            words.append(name)
        elif value is not None and value is not False and value != _USUAL.get(name):
            words += [name, str(value)]
    return shlex.join(words)


def _selection_options(record: Record) -> list[tuple[str, Any]]:
    """The options that say how much stays, and by which scores."""
    settings, budget = record.settings, record.use.budget_bytes if record.use else None
    has_keep = budget is None and settings.schedule in SCHEDULES and record.removes_experts
    is_seeded = settings.method == "random" and not can_score_again(record)
    return [
        # Exact, since the bytes are divided by a power of two.
        ("--budget-gib", repr(budget / 2**30).removesuffix(".0") if budget is not None else None),
        ("--round-for", settings.rounded_for or None if budget is not None else None),
        ("--keep", (settings.total or 0) // len(record.layers) if has_keep else None),
        # (As --by found it.)
        ("--width", settings.width),
        ("--method", settings.method),
        ("--seed", settings.seed or None if is_seeded else None),
        ("--mix", mix_text(settings.mix) if settings.mix is not None else None),
        ("--schedule", settings.schedule),
        ("--spread", settings.spread),
        ("--floor", settings.floor),
        ("--protect-super-experts", settings.protect_super_experts),
    ]


def _text_options(record: Record, given: GivenCalibration, evaluates: bool) -> list[tuple[str, Any]]:
    """The options of a run that say what text it reads, and how it computes."""
    settings, again = record.settings, can_score_again(record)
    return [
        *(("--calibration", text) for text in given.calibration),
        ("--samples", given.samples),
        ("--seq-len", given.seq_len),
        # (With saved scores it may be stated above, for the selection.)
        ("--seed", given.seed if again or settings.method != "random" else None),
        ("--date", given.date),
        ("--skip-bad", given.skip_bad),
        # Held-out text is not used for scoring.
        ("--evaluate", evaluates),
        # The last digits of the scores depend on these; another kind of GPU or CPU may still round differently.
        ("--dtype", settings.dtype if settings.dtype in DTYPES else None),
        ("--device", settings.device or None),
        ("--batch-tokens", settings.batch_tokens or None),
        ("--no-channels", again and settings.channels is False),
    ]


def mix_text(shares: Mapping[str, float]) -> str:
    """The value of --mix that gives exactly these shares: with simple numbers if possible, else with all digits."""
    fractions = {name: Fraction(share).limit_denominator(1000) for name, share in shares.items()}
    common = math.lcm(*(each.denominator for each in fractions.values()))
    simple = ",".join(f"{name}={share * common}" for name, share in fractions.items())
    try:
        if SelectionSettings(mix=simple).shares == dict(shares):
            return simple
    except SettingsError:
        # All shares are too small for such a denominator.
        pass
    return ",".join(f"{name}={share!r}" for name, share in shares.items())
