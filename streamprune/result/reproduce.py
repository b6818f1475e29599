"""The one command that makes a pruned model again, told from its record."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from streamprune.choice.selection import Selection
from streamprune.errors import SettingsError
from streamprune.settings import DEFAULT_CONTEXT, DEFAULT_SHARD_BYTES, DTYPES, SCHEDULES

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
        return Selection(mix=mix).shares
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
