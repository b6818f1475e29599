"""From what the user names with --calibration to a recipe, and what can be refused before text is read. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import msgspec

from streamprune.calibration.builtin_text import BUILTIN
from streamprune.calibration.recipe import (
    NamedSources,
    Recipe,
    Source,
    builtin_domains,
    file_opened,
    find_recipe,
    named_path,
    read_recipe,
)
from streamprune.errors import CalibrationError, SettingsError
from streamprune.files.json_text import show
from streamprune.selection.settings import parse_mix
from streamprune.tables import plain


def chosen_recipe(sources: Sequence[str]) -> Recipe:
    """The recipe that the user names, or one with equal parts of the named files, folders and domains."""
    found = [find_recipe(source) for source in sources]
    paths = [path for path in found if path is not None]
    if paths and len(sources) > 1:
        raise CalibrationError(f"{paths[0]} is a recipe: give it alone, and list the other sources in it.")
    if paths:
        return read_recipe(paths[0])
    named: list[tuple[str, Source]] = []
    for text in sources:
        path, exists = named_path(text)
        if text.partition(":")[0] == BUILTIN and not exists:
            named += [(domain, Source(builtin=domain)) for domain in builtin_domains(text)]
        else:
            named.append((path.name or path.resolve().name or text, Source(path=str(path))))
    unique: dict[str, Source] = {}
    for name, source in named:
        # Names are written as in `--mix code=0.5,prose=0.5`.
        base = re.sub(r"[=,:\s]+", "_", plain(name))
        numbered = (base if number == 1 else f"{base}-{number}" for number in itertools.count(1))
        name = next(each for each in numbered if each not in unique)
        unique[name] = msgspec.structs.replace(source, name=name)
    return NamedSources(name=", ".join(unique), sources=list(unique.values()))


def refuse_sources(sources: Sequence[str], mix: str | None) -> None:
    """Raise for files that are not there, for recipes and domains that are unknown, and for a mix of other sources.

    Nothing of the text is read. Raises CalibrationError, or SettingsError for the mix.
    """
    recipe = chosen_recipe(sources)
    if isinstance(recipe, NamedSources):
        for path in (named_path(text)[0] for text in sources if text.partition(":")[0] != BUILTIN):
            if not path.exists():
                with file_opened(path):
                    pass
    names = [source.name for source in recipe.sources]
    unknown = [name for name in (parse_mix(mix) if mix is not None else ()) if name not in names]
    if unknown:
        raise SettingsError(f"--mix: there is no source {show(unknown[0])}. The calibration has: {', '.join(names)}.")
