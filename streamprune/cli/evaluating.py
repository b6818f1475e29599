"""The command that measures what a model lost: `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from streamprune.cli.common import quiet_libraries, reports_errors, sampling_options
from streamprune.machine import limit_library_memory
from streamprune.settings import DTYPES, STATES

_FOLDER = click.Path(path_type=Path)


@click.command("eval")
@click.argument("model")
@click.option("--against", metavar="ORIGINAL", help="The model that MODEL was made from: a folder or a Hub id.")
@click.option(
    "--data", multiple=True, metavar="RECIPE|FILE",
    help="Held-out text, as for --calibration. Any number of times.  [default: what `run --evaluate` held back]",
)  # fmt: skip
@sampling_options
@click.option("-o", "--output", type=_FOLDER, help="Folder for the results.  [default: MODEL's own, if we made it]")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--against-revision", help="The same for ORIGINAL.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the models.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda:0", help="Where to compute.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="What to compute in.")
@click.option("--batch-tokens", type=int, help="Tokens per micro-batch at most.  [default: as for `run`]")
@click.option(
    "--states", type=click.Choice(STATES), default="auto", show_default=True,
    help="Where hidden states lie between blocks: on the card, in RAM, or in a file.",
)  # fmt: skip
@click.option("--vram-gib", type=float, help="Most that may be taken on the card.  [default: what is free]")
@click.option("--ram-gib", type=float, help="Most that may be taken of RAM.  [default: what is available]")
@click.option("--quiet", is_flag=True, help="Print the results and errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@reports_errors
def evaluate(model: str, output: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure MODEL (a local folder or a Hub id) on held-out text, one block at a time.

    Tells loss and perplexity of each source, and with --against how far the predictions are from the original's: KL
    divergence, and how often both think the same token likeliest.
    """
    limit_library_memory(tight=options["ram_gib"] is not None)
    from streamprune.evaluation.command import evaluate_text
    from streamprune.evaluation.settings import EvalSettings

    quiet_libraries(downloads=quiet)
    told = evaluate_text(EvalSettings(model=model, **options), output, quiet)
    if as_json:
        click.echo(json.dumps(told, indent=2))
