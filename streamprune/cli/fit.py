"""The commands `fit`, `devices` and `calibration show`."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from streamprune.calibration.chosen import refuse_sources
from streamprune.checkpoint.hub import resolve_model
from streamprune.cli import options as opt
from streamprune.cli.help import Command
from streamprune.common_settings import Sampling
from streamprune.errors import DoesNotFitError, SettingsError
from streamprune.fit.answer import fit_object, fit_text, known_budget, measured_lines, measured_object
from streamprune.fit.engines import check_served, rounded_count
from streamprune.fit.estimate import Estimate, Fit, Footprint, check_keep
from streamprune.hardware.memory import limit_library_memory
from streamprune.models.config_json import resolve_keep
from streamprune.targets import PruningTarget, ServingSpec, Storage, check_gguf_source, planned_context


@click.command(cls=Command)
@click.argument("model")
@opt.BUDGET
@opt.GGUF
@click.option(
    "--weights", type=opt.WEIGHTS_TYPE, default="source", show_default=True,
    help="How weights are stored: as they are, or as `run --weights` writes them. (Formerly --weights-dtype.)",
)  # fmt: skip
@opt.QUANTIZED
@opt.MTP_LAYERS
@opt.ENGINE
@click.option("--keep", type=int, help="Experts kept in every layer.  [default: all]")
@click.option("--ratio", type=float, help="Share of experts removed from every layer, instead of --keep.")
@click.option("--width", type=int, help="Channels kept of each expert.  [default: all]")
@click.option("--measure", is_flag=True, help="Also load the model on the GPU, run a prompt of that size, and compare.")
@click.option("--device", metavar="cuda:N", default="cuda:0", show_default=True, help="The GPU for --measure.")
@opt.REVISION
@opt.TRUST_REMOTE_CODE
@opt.JSON_OBJECT
def fit(model: str, trust_remote_code: bool, measure: bool, device: str, as_json: bool, **given: Any) -> None:
    """Say whether MODEL fits a GPU, and how many experts could stay.

    MODEL is a local folder, a Hub id (only its headers are read), or a folder with only a config.json. Without
    --budget-gib or --gpu, the GPU of this machine is used; without one, all known GPUs are listed. Exit status: 0 if it
    fits, or no budget is known, 3 if it does not fit.
    """
    # Set before the libraries are imported: they read these variables on import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    budget_gib, gpu, revision = given.pop("budget_gib"), given.pop("gpu"), given.pop("revision")
    storage = Storage.of(given["weights"], given.pop("quantize"), None, given.pop("tensor_parallel"), given["mtp"])
    context, gguf, ratio = given.pop("context"), given.pop("gguf"), given.pop("ratio")
    stored = given.pop("weights")
    if gguf is not None:
        check_gguf_source(gguf, stored)
    wanted = ServingSpec(context=planned_context(context, None), weights=gguf or stored, stored=stored, **given)
    budget = known_budget(budget_gib, gpu)
    from streamprune.planning.forms import read_forms

    said = None if as_json else opt.say_loading
    footprint = read_forms(model, revision, trust_remote_code, storage, wanted.width, said)
    keep = _kept(footprint, wanted.keep, ratio)
    wanted = replace(wanted, context=planned_context(context, footprint.max_positions), keep=keep)
    # Refused before anything else is said of it; with --gguf also weights that cannot be stored as --weights says.
    for weights in (wanted.weights, *((stored,) if stored not in ("source", wanted.weights) else ())):
        footprint.sizes(weights, wanted.width)
    if measure and footprint.weights.counts is not None and not trust_remote_code:
        raise SettingsError(
            f"--measure loads the model, but the layers of {model} keep different numbers of experts, so that the "
            "Python code in its folder is needed. If you trust its author, add --trust-remote-code."
        )
    wanted = _for_engine(footprint, wanted)
    answer = Fit(footprint, wanted, budget.nbytes) if budget is not None else Estimate(footprint, wanted)
    found = _measured(answer, revision, device, trust_remote_code) if measure else ()
    if as_json:
        measured = {"measured": measured_object(found)} if measure else {}
        click.echo(opt.json_text({**fit_object(answer, budget), **measured}))
    else:
        click.echo("\n".join([fit_text(answer, budget), *(["", *measured_lines(found)] if found else [])]))
    if isinstance(answer, Fit) and not answer.fits:
        sys.exit(DoesNotFitError.exit_code)


def _kept(footprint: Footprint, keep: int | None, ratio: float | None) -> int | None:
    """Experts of each layer by --keep or --ratio; None for all. Raises SettingsError where that is impossible."""
    if ratio is not None:
        _ = PruningTarget(keep=keep, ratio=ratio)
        if keep is not None:
            raise SettingsError("Give either --keep or --ratio, not both.")
        if footprint.spec is not None:
            return resolve_keep(footprint.spec, None, ratio)
        check_keep(footprint, 0, f"--ratio {ratio:g}")
    if keep is not None:
        check_keep(footprint, keep)
    return keep


def _for_engine(footprint: Footprint, wanted: ServingSpec) -> ServingSpec:
    """The use with --keep rounded for --round-for. Raises SettingsError if the engine of --for cannot take that."""
    served = footprint.served(wanted)
    if served is None:
        return wanted
    if wanted.round_for is not None and wanted.keep is not None:
        served = served.with_count(rounded_count(served, wanted.round_for))
        wanted = replace(wanted, keep=served.count, unrounded=wanted.keep)
    check_served(served, wanted.engine)
    return wanted


def _measured(answer: Estimate, revision: str | None, device: str, trust_remote_code: bool) -> tuple[Any, ...]:
    limit_library_memory()
    from streamprune.fit.measure import measure

    opt.quiet_libraries(downloads=False)
    folder = resolve_model(answer.footprint.model, revision, trust_remote_code)
    return measure(str(folder), answer, device, trust_remote_code)


@click.command(cls=Command)
@opt.JSON_OBJECT
def devices(as_json: bool) -> None:
    """Show this machine's NVIDIA GPUs, its RAM and the disk of the current folder.

    Values that cannot be read are shown as unknown, with the reason.
    """
    limit_library_memory()
    from streamprune.hardware.gpus import devices_object, devices_text
    from streamprune.hardware.nvml import list_gpus

    gpus = list_gpus()
    click.echo(opt.json_text(devices_object(gpus, Path())) if as_json else devices_text(gpus, Path()))


@click.group()
def calibration() -> None:
    """Look at calibration data."""


@calibration.command(cls=Command)
@click.argument("recipe", nargs=-1, required=True)
@click.option("--model", required=True, help="The model whose tokenizer and chat template make the tokens.")
@opt.SAMPLING
@opt.REVISION
@opt.TRUST_REMOTE_CODE
@opt.JSON_OBJECT
def show(recipe: tuple[str, ...], model: str, as_json: bool, **options: Any) -> None:
    """Make the tokens of RECIPE, and print shares, counts and a sample of each source.

    RECIPE is a recipe file, the name of one that comes with streamprune, or files, folders or builtin.
    """
    sampling = Sampling(**{each.name: options.pop(each.name) for each in fields(Sampling)})
    refuse_sources(recipe, None)
    resolve_model(model, options["revision"], options["trust_remote_code"], config_only=True)
    opt.say_loading(as_json)
    limit_library_memory()
    from streamprune.calibration.show import calibration_text, show_calibration

    opt.quiet_libraries(downloads=as_json)
    described = show_calibration(recipe, model, sampling, **options)
    click.echo(opt.json_text(described) if as_json else calibration_text(described))
