"""tools/gpu_check on the CPU: its parts, what it saves, and that a part which fails costs no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring.parts import PARTS, Check
from measuring.processes import ProcessError
from measuring.shapes import build, config_of

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--shape", "tiny", "--samples", "6", "--seq-len", "64", "--bench-samples", "4"]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/gpu_check as a user runs it, with one thread."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_check"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it saves. No rounds of the bench, which has its own test; a whole run is scoring with writing."""
    path = tmp_path_factory.mktemp("check") / "check.json"
    parts = ["--parts", "tests", "score", "bench", "fit", "--rounds", "0", "--layers", "3"]
    done = gpu_check(*SMALL, *parts, "--output", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(path.read_text())
    assert json.loads(done.stdout) == figures
    return figures


def test_where_and_when_is_saved(saved: dict[str, Any]) -> None:
    assert (saved["device"], saved["torch"]) == ("cpu", torch.__version__)
    assert list(saved["parts"]) == ["tests", "score", "bench", "fit"]
    for part in saved["parts"].values():
        assert part["date"].count("-") == 2
        assert part["settings"]["shape"] == "tiny"
    assert "card" in saved["parts"]["tests"]["skipped"]


def test_scoring_is_extrapolated_to_the_whole_model(saved: dict[str, Any]) -> None:
    score = saved["parts"]["score"]
    assert score["tokens"] == score["told"]["calibration_tokens"] == 6 * 64
    assert len(score["seconds_of_blocks"]) == 3
    # The shape has four blocks; of the three that were built the last one counts.
    assert score["blocks_of_the_model"] == 4
    assert score["seconds_per_block"] == pytest.approx(score["seconds_of_blocks"][2], abs=0.001)
    assert score["seconds_for_all_blocks"] == pytest.approx(4 * score["seconds_per_block"], abs=0.01)
    assert score["seconds_for_the_model"] >= score["seconds_for_all_blocks"]
    assert 0 < score["achieved_share"] < 1
    assert score["achieved_share"] == pytest.approx(score["achieved_tflops"] / score["matrix_rate_tflops"], rel=0.2)
    assert score["read_mib_per_second"] > 0
    assert score["peak_mib"] > 100


def test_the_bench_takes_the_options_it_is_given(saved: dict[str, Any]) -> None:
    bench = saved["parts"]["bench"]
    assert (bench["shape"], bench["layers"], bench["tokens"], bench["rounds"]) == ("tiny", 3, 4 * 64, 0)


def test_a_result_is_planned_for_a_budget_that_half_of_the_experts_need(saved: dict[str, Any]) -> None:
    fit = saved["parts"]["fit"]
    assert fit["experts_per_layer"] == 8
    assert fit["predicted"]["total_bytes"] <= fit["budget_gib"] * 2**30
    assert fit["measured"] is None


def test_parts_that_fail_are_recorded_and_cost_no_other(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    path.write_text(json.dumps({"device": "cpu", "parts": {"fit": {"budget_gib": 1}, "score": {"error": "older"}}}))
    done = gpu_check(*SMALL, "--parts", "score", "tests", "run", "--part-seconds", "0.5", "--output", str(path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: score, run failed; the other parts are measured."
    parts = json.loads(path.read_text())["parts"]
    assert set(parts) == {"fit", "score", "tests", "run"}
    assert parts["fit"] == {"budget_gib": 1}
    for name in ("score", "run"):
        assert "raise --part-seconds" in parts[name]["error"]
    assert "error" not in parts["tests"]


def test_figures_of_another_device_and_other_files_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    for content, words in (('{"device": "NVIDIA A", "parts": {}}', "has figures of NVIDIA A"), ("[1]", "was not made")):
        path.write_text(content)
        done = gpu_check(*SMALL, "--parts", "tests", "--output", str(path))
        assert done.returncode == 1
        assert done.stderr.count("Error:") == 1
        assert words in done.stderr
        assert path.read_text() == content


@pytest.mark.skipif(torch.cuda.device_count() > 50, reason="there is such a card")
def test_a_card_that_is_not_there_ends_in_one_line() -> None:
    done = gpu_check("--device", "cuda:50", "--parts", "score")
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "so that there is no cuda:50" in done.stderr


def test_every_part_is_told_in_the_help() -> None:
    text = gpu_check("--help").stdout
    assert all(f"| {name} |" in text for name in PARTS)


def test_what_an_earlier_part_left_is_not_gone_on_with(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "shape": "tiny", "layers": 2, "samples": 2, "seq_len": 8, "bench_samples": 1, "forward_batch": 1, "rounds": 1,
        "device": "cpu", "vram_gib": None, "states": "auto", "budget_gib": None, "context": 8, "folder": tmp_path,
    }  # fmt: skip
    check = Check(**settings, deadline=time.monotonic() + 100)
    build(config_of("tiny", 2), tmp_path / "model")
    whole = (tmp_path / "model" / "model.safetensors.index.json").stat()
    (tmp_path / "output.safetensors.work").mkdir()
    (tmp_path / "output.streamprune.log").touch()
    job = check.job("score")
    assert not list(tmp_path.glob("output*"))
    # The checkpoint was there, and is used again.
    assert (job.model / "model.safetensors.index.json").stat() == whole
    assert [len(json.loads(line)["input_ids"]) for line in job.tokens.read_text().splitlines()] == [8, 8]
    with pytest.raises(ProcessError, match="time for one part is over"):
        _ = replace(check, deadline=time.monotonic()).left
