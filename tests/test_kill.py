"""The harness that kills runs, in its short mode: critical points and random instants, and the same bytes after all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_killed_runs_end_with_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kill"), "--kills", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "qwen3_moe", "gemma4", "deepseek_v2", "evaluated", "score", "global schedule",
        "super experts protected", "prune", "prune",
    ]  # fmt: skip
    assert all(line.endswith("identical") and " kills" in line for line in lines), done.stdout
