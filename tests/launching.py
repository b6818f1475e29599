"""Several real processes that share a command, launched as torchrun launches them; and what each of them said."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forked import Forked

#: Long enough for a machine that is busy with other things.
PATIENCE = 120


@dataclass
class Launch:
    """Processes that were launched together, by their ranks."""

    processes: list[Forked]

    def wait_for(self, path: Path) -> None:
        """Wait until a file is there."""
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> list[tuple[int, str, str]]:
        """Exit status, stdout and stderr of each, once all have ended."""
        try:
            said = [process.communicate(timeout=PATIENCE) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]


def launch(words: Sequence[object], folders: Sequence[Path], script: str = "") -> Launch:
    """Start `streamprune` with the same words in each of these folders, one process each.

    `script` is Python that every process runs first, with its number as `rank`.
    """
    return _start(f"{script}\nfrom streamprune.cli import main\nmain()\n", words, folders)


def ranks_told(script: str, count: int, folder: Path) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of so many processes that run Python, each with its number as `rank`."""
    return _start(script, (), [folder] * count).end()


def _start(script: str, words: Sequence[object], folders: Sequence[Path]) -> Launch:
    count, port = len(folders), _free_port()
    code = f"import os\nrank = int(os.environ['RANK'])\n{script}"
    processes = []
    for rank, folder in enumerate(folders):
        told = {
            "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        processes.append(Forked(code, words, folder, told))
    return Launch(processes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
