"""The harness that kills runs, in short: critical points and random instants, and the same bytes after all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forked
from tests.thorough import thorough

ROOT = Path(__file__).resolve().parent.parent
EVERY_CASE = [
    "qwen3_moe", "gemma4", "deepseek_v2", "evaluated", "refit", "w4a16", "w4a16", "score", "global schedule",
    "super experts protected", "quantized", "quantized", "prune", "prune", "search",
    "run --best",
]  # fmt: skip


@pytest.mark.parametrize(
    ("cases", "options"),
    [
        (["refit", "global schedule", "prune, gpt_oss"], ["--points", "2", "--kills", "1"]),
        (["run --best"], ["--points", "1", "--kills", "1"]),
        pytest.param(EVERY_CASE, ["--kills", "2"], marks=thorough),
    ],
    ids=["a few", "run --best", "every case"],
)
def test_killed_runs_end_with_the_same_bytes(cases: list[str], options: list[str]) -> None:
    chosen = [word for case in dict.fromkeys(cases) for word in ("--case", case)]
    tool = str(ROOT / "tools" / "kill")
    process = Forked(f"import runpy; runpy.run_path({tool!r}, run_name='__main__')", [*chosen, *options], ROOT)
    printed, told = process.communicate(timeout=3000)
    assert process.returncode == 0, told[-3000:]
    lines = printed.splitlines()
    assert len(lines) == len(cases)
    assert all(line.startswith(case) for line, case in zip(lines, cases, strict=True)), printed
    assert all(line.endswith("identical") and " kills" in line for line in lines), printed
