"""The commands about calibration data: `calibration show`."""

from __future__ import annotations

import json
from typing import Any

import click

from streamprune.cli.common import quiet_libraries, reports_errors, sampling_options
from streamprune.machine import limit_library_memory
from streamprune.settings import check_least


@click.group()
def calibration() -> None:
    """What models are calibrated on."""


@calibration.command()
@click.argument("recipe", nargs=-1, required=True)
@click.option("--model", required=True, help="The model whose tokenizer and chat template make the tokens.")
@sampling_options
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@reports_errors
def show(recipe: tuple[str, ...], model: str, as_json: bool, **options: Any) -> None:
    """Make the tokens of RECIPE, and print shares, counts and a sample of each source.

    RECIPE is a recipe file, the name of one that comes with streamprune, or files, folders or builtin.
    """
    for name, least in (("samples", 1), ("seq_len", 2)):
        value = options[name]
        if value is not None:
            check_least(f"--{name.replace('_', '-')}", value, least)
    limit_library_memory()
    from streamprune.text.show import calibration_text, show_calibration

    quiet_libraries(downloads=as_json)
    described = show_calibration(recipe, model, **options)
    click.echo(json.dumps(described, indent=2) if as_json else calibration_text(described))
