"""The command that writes a candidate of a search. No torch."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, fields
from pathlib import Path

from streamprune.config import PruneSettings, RunSettings

#: Settings of a search that the command which writes a candidate states otherwise, or leaves to the user.
_ITS_OWN = {"model", "output", "work_dir", "scores", "overwrite", "resume", "checkpoint_every", "verify", "report"}
#: The options of settings that are not called like them.
_OPTIONS = {"for_engine": "--for", "max_shard_bytes": "--max-shard-size"}


def writing_command(scores: Path, own: RunSettings) -> str:
    """The command that writes a candidate, by the settings of a run of its own, with the `scores` of its search."""
    kind = RunSettings if own.sends_text else PruneSettings
    words = ["streamprune", "run" if own.sends_text else "prune", own.model, "-o", "OUT", "--scores", str(scores)]
    for each in fields(kind):
        value = getattr(own, each.name, None)
        usual = each.default_factory() if each.default_factory is not MISSING else each.default
        # (Not `in`: a seed of 0 is no False.)
        if value is None or value is False or value == usual or each.name in _ITS_OWN:
            continue
        option = _OPTIONS.get(each.name, "--" + each.name.replace("_", "-"))
        for one in value if isinstance(value, tuple) else (value,):
            words += [option] if one is True else [option, str(one)]
    return shlex.join(words)
