"""The one command that makes a pruned model again, from its record. No torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from fractions import Fraction

from streamprune.config import DEFAULT_CONTEXT, DEFAULT_SHARD_BYTES, DTYPES
from streamprune.errors import SettingsError
from streamprune.reporting.record import Calibration, GivenCalibration, Record, Settings, Use
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.settings import SelectionSettings

#: What the folder of the published model is called in commands that need its files.
THIS_MODEL = "this-model"


def can_score_again(record: Record) -> bool:
    """Whether `streamprune run` makes the model again. Else its own scores and record are needed: the choice was made
    by hand, or from scores of which the record does not state all."""
    settings, given = record.settings, _given(record)
    if settings.method is None or given is None or settings.propagate != "original":
        # (Scores that were taken with --propagate pruned may have been used for another choice than the run's own.)
        return False
    # One --seed is for the calibration and the random method alike.
    return settings.method != "random" or settings.seed == (given.seed or 0)


def reproduce_command(record: Record) -> str:
    """The command that writes the same model, to the byte, from the same source model and calibration text.

    Local files go by the names that they had, without folders; where `can_score_again` is False the files of the model
    itself are in the folder THIS_MODEL.
    """
    settings, given = record.settings, _given(record)
    again = can_score_again(record)
    words = ["streamprune", "run" if again else "prune", settings.model]
    words += ["-o", f"{settings.model.rpartition('/')[2]}-pruned"]
    if settings.revision is not None:
        words += ["--revision", settings.revision]
    if not again and record.calibration is not None:
        words += ["--scores", THIS_MODEL]
    if settings.method is None:
        words += ["--keep-file", f"{THIS_MODEL}/streamprune.json"]
    else:
        words += [*_target_options(record), *_selection_options(settings, again)]
    if record.use is not None:
        words += _use_options(record.use)
    if again and given is not None and record.calibration is not None:
        words += _scoring_options(given, record.calibration, settings)
    if settings.max_shard_bytes not in (None, DEFAULT_SHARD_BYTES):
        words += ["--max-shard-size", str(settings.max_shard_bytes)]
    return shlex.join(words)


def _given(record: Record) -> GivenCalibration | None:
    return record.calibration.stated.given if record.calibration else None


def _target_options(record: Record) -> Iterator[str]:
    budget = record.use.budget_bytes if record.use else None
    if budget is not None:
        # Bytes divided by a power of two: the number comes back the same.
        yield from ("--budget-gib", repr(budget / 2**30).removesuffix(".0"))
    elif record.settings.schedule in SCHEDULES:
        yield from ("--keep", str((record.settings.total or 0) // len(record.layers)))


def _selection_options(settings: Settings, again: bool) -> Iterator[str]:
    if settings.method not in (None, "reap"):
        yield from ("--method", settings.method)
    if settings.method == "random" and settings.seed and not again:
        yield from ("--seed", str(settings.seed))
    if settings.mix is not None:
        yield from ("--mix", mix_text(settings.mix))
    if settings.schedule not in (None, "uniform"):
        yield from ("--schedule", settings.schedule)
    if settings.spread is not None:
        yield from ("--spread", repr(settings.spread))
    if settings.floor is not None:
        yield from ("--floor", str(settings.floor))
    if settings.protect_super_experts:
        yield "--protect-super-experts"


def mix_text(shares: Mapping[str, float]) -> str:
    """The value of --mix that gives just these shares: simple numbers if they do, else all their digits."""
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


def _use_options(use: Use) -> Iterator[str]:
    if use.context != DEFAULT_CONTEXT:
        yield from ("--context", str(use.context))
    if use.batch != 1:
        yield from ("--batch", str(use.batch))
    if use.kv_dtype != "auto":
        yield from ("--kv-dtype", use.kv_dtype)


def _scoring_options(given: GivenCalibration, calibration: Calibration, settings: Settings) -> Iterator[str]:
    for text in given.calibration:
        yield from ("--calibration", text)
    for option, number in (("--samples", given.samples), ("--seq-len", given.seq_len), ("--seed", given.seed)):
        if number is not None:
            yield from (option, str(number))
    if calibration.held_back:
        # Text that is held back to be measured on is not scored on.
        yield "--evaluate"
    # The last digits of the scores depend on these; a GPU or a processor of another kind may round otherwise still.
    if settings.dtype in DTYPES:
        yield from ("--dtype", str(settings.dtype))
    if settings.device in ("cpu", "cuda"):
        yield from ("--device", str(settings.device))
    if settings.batch_tokens:
        yield from ("--batch-tokens", str(settings.batch_tokens))
