"""Python in processes that are forked off one which has imported torch, transformers and the package.

For tests of what processes do: not of what they import or say while they do, nor with variables that libraries read
when they are imported (HF_HOME), nor of memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from measuring import forking

#: Of the process that is forked: as it was before any test changed it, and without threads, which are lost in a fork.
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
#: As in the tests' own process: what is said must not depend on the machine.
_NO_CLOCK = "from streamprune import progress; progress.SILENT_SECONDS = 1e6\n"


class Forked(forking.Forked):
    """Like `subprocess.Popen` of `python -c CODE WORDS` with pipes for what it prints, as text."""

    def __init__(
        self, code: str, words: Sequence[object], folder: Path, environment: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        forking.start_server(_ENVIRONMENT)
        given = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
        super().__init__(["-c", _NO_CLOCK + code, *map(str, words)], folder, given)
