"""The harness that kills runs, in short: critical points and random instants, and the same bytes after all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.thorough import thorough

ROOT = Path(__file__).resolve().parent.parent
EVERY_CASE = [
    "qwen3_moe", "gemma4", "deepseek_v2", "evaluated", "refit", "w4a16", "w4a16", "score", "global schedule",
    "super experts protected", "quantized", "quantized", "prune", "prune", "search",
]  # fmt: skip


@pytest.mark.parametrize(
    ("cases", "options"),
    [
        (["refit", "global schedule", "prune, gpt_oss"], ["--points", "2", "--kills", "1"]),
        pytest.param(EVERY_CASE, ["--kills", "2"], marks=thorough),
    ],
    ids=["a few", "every case"],
)
def test_killed_runs_end_with_the_same_bytes(cases: list[str], options: list[str]) -> None:
    chosen = [word for case in dict.fromkeys(cases) for word in ("--case", case)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kill"), *chosen, *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    assert all(line.startswith(case) for line, case in zip(lines, cases, strict=True)), done.stdout
    assert all(line.endswith("identical") and " kills" in line for line in lines), done.stdout
