"""The text that `run --evaluate` holds out: choosing it, and saving it for later measurements of the same model."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamprune.calibration.sequences import Calibration, fingerprint_of
from streamprune.errors import CalibrationError, OutputError, ReportError, StreampruneError
from streamprune.files.durable import PARTIAL, names_in, write_atomically, writing
from streamprune.files.names import sibling_path
from streamprune.output.plan import REPORT_NAME
from streamprune.progress import Progress
from streamprune.reporting.record import Record, read_record
from streamprune.reporting.record_text import HeldBack

#: The share of each source's sequences that is held out: enough for an interval, and little is lost for scoring.
SHARE = 0.1
#: The folder's name is the output's with this suffix. (Not in the output, which may be published.)
HELD_OUT_SUFFIX = ".held-out"
_RECIPE_NAME = "recipe.json"
#: The names of the files in that folder, finished or not.
_OURS = re.compile(rf"(\d+\.jsonl|{re.escape(_RECIPE_NAME)})({re.escape(PARTIAL)})?")


def split_held_out(whole: Calibration) -> Calibration:
    """The calibration without a part of each source's sequences, which become its `held_out`.

    They are spread evenly over the source, the same ones every time. In packed text, two neighbouring sequences may be
    from one document. Raises CalibrationError for a source with fewer than two sequences of two tokens.
    """
    held: set[int] = set()
    for source, name in enumerate(whole.sources):
        numbers = [
            number
            for number, (ids, of) in enumerate(zip(whole.sequences, whole.source_of, strict=True))
            if of == source and len(ids) > 1
        ]
        if len(numbers) < 2:
            raise CalibrationError(
                f"{name} has {len(numbers)} sequences of two tokens or more; --evaluate needs one to score with and "
                "one to measure on. Give more text, a shorter --seq-len, or omit --evaluate."
            )
        count = max(1, round(SHARE * len(numbers)))
        held |= {numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)}
    rest = [number for number in range(len(whole.sequences)) if number not in held]
    return replace(_part(whole, rest), held_out=replace(_part(whole, sorted(held)), anchor=None))


def _part(whole: Calibration, numbers: list[int]) -> Calibration:
    sequences = tuple(whole.sequences[number] for number in numbers)
    source_of = tuple(whole.source_of[number] for number in numbers)
    part = replace(whole, sequences=sequences, source_of=source_of, fingerprint=fingerprint_of(sequences, source_of))
    sources = [
        {**stated, "sequences": source_of.count(number), "tokens": tokens}
        for number, (stated, tokens) in enumerate(zip(whole.recipe.get("sources", []), part.tokens_of, strict=False))
    ]
    return replace(part, recipe={**whole.recipe, "sources": sources, "part_of": whole.fingerprint})


def held_out_recipe(output: Path) -> Path:
    """The path of the recipe of the text that was held out for an output."""
    output = Path(os.path.expanduser(output))  # noqa: PTH111
    if output.name in ("", ".."):
        # A relative path such as `.`, which has no name.
        output = Path(os.path.abspath(output))  # noqa: PTH100
    return sibling_path(output, HELD_OUT_SUFFIX) / _RECIPE_NAME


def recipe_within(name: str) -> str:
    """The value of --data; for a folder with held-out text, the recipe in it."""
    recipe = Path(os.path.expanduser(name)) / _RECIPE_NAME  # noqa: PTH111
    # (In this order: resolve only what exists.)
    is_ours = os.path.isfile(recipe) and recipe.parent.resolve().name.endswith(HELD_OUT_SUFFIX)  # noqa: PTH113
    return str(recipe) if is_ours else name


def save_held_out(output: Path, held: Calibration, progress: Progress) -> None:
    """Save the text next to the output, and print where; a failure is only a note."""
    try:
        recipe = write_held_out(output, held)
    except StreampruneError as error:
        progress.say(f"note: {error}")
        return
    progress.say(f"held-out text: {recipe}")


def write_held_out(output: Path, held: Calibration) -> Path:
    """Save the text next to the output, as token ids; returns its recipe. Raises OutputError, ResourceError."""
    recipe = held_out_recipe(output)
    # (Our folder may lack the recipe, if a run was killed while it was written.)
    if any(_OURS.fullmatch(path.name) is None for path in names_in(recipe.parent)):
        raise OutputError(
            f"The held-out text cannot be saved: {recipe.parent} has files that streamprune did not make."
        )
    with writing(f"Saving the held-out text in {recipe.parent}", recipe.parent):
        recipe.parent.mkdir(exist_ok=True)
        sources: list[dict[str, Any]] = []
        for number, name in enumerate(held.sources):
            rows = [ids.tolist() for ids, of in zip(held.sequences, held.source_of, strict=True) if of == number]
            lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
            write_atomically(recipe.parent / f"{number}.jsonl", lines.encode())
            sources.append({"name": name, "path": f"{number}.jsonl", "samples": len(rows)})
        longest = max(map(len, held.sequences))
        stated = {"name": f"held out for {output.name}", "sequence_length": longest, "sources": sources}
        write_atomically(recipe, (json.dumps(stated, indent=2) + "\n").encode())
    return recipe


def pruned_folder(model: str) -> Path | None:
    """The folder of a model that streamprune made; None for another model, or a name that no folder has."""
    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    return folder if os.path.isfile(folder / REPORT_NAME) else None  # noqa: PTH113


def read_record_of(model: str) -> Record | None:
    """The record of a model that streamprune made; None for another model, or if the record is not valid."""
    folder = pruned_folder(model)
    with suppress(ReportError):
        return read_record(folder) if folder is not None else None
    return None


def held_back_fingerprint(record: Record | None) -> str | None:
    """The fingerprint of the text that was held out by the run with this record; None if there is none.

    If weights were computed from other text than the experts were scored on, it must have held out the same.
    """
    if record is None or record.calibration is None:
        return None
    texts = [record.calibration, *([record.other_text] if record.other_text is not None else [])]
    found = {each.held_back.fingerprint if isinstance(each.held_back, HeldBack) else None for each in texts}
    return found.pop() if len(found) == 1 else None
