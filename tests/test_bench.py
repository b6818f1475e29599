"""tools/bench and what it shares with tools/gpu_check: the arithmetic it counts, its figures, and the whole of it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from measuring import several
from measuring.comparison import KINDS, MIB, Model, busy, compare, floor_seconds, gpu_figures
from measuring.disk import cached_share, copy_and_sync, drop_from_page_cache, read_all
from measuring.extrapolation import extrapolate
from measuring.processes import Job, ProcessError, run_process
from measuring.shapes import Work, build, config_of, is_built, layer_bytes, shape_names, weight_files, work_of
from measuring.workers import GpuPeaks
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.programs import run_program
from tests.thorough import thorough

ROOT = Path(__file__).resolve().parent.parent
TINY = config_of("tiny")
MODEL = Model(layers=4, tokens=100, hidden=128, layer_bytes=MIB, weights_bytes=5 * MIB, work=Work(10, 1, 2))


def one_round(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A round of made-up figures, in which scoring takes 1.1 times as long as the forward and the run 1.2 times."""
    ours = {"summary": {}, "layers": [], "process_seconds": 15.0, "cpu_seconds": 20.0}
    figures: dict[str, dict[str, Any]] = {
        "forward": {"seconds": 10.0, "loading_seconds": 2.0, "computing_seconds": 8.0},
        "score": {**ours, "seconds": 11.0},
        "run": {**ours, "seconds": 12.0},
        "read": {"seconds": 1.0, "bytes": 5 * MIB},
        "copy": {"seconds": 3.0, "bytes": 2 * MIB},
        "matrix": {"seconds": 2.5, "flop_per_second": 1000.0},
    }
    both = {"peak_bytes": 100 * MIB, "cpu_seconds": 10.0, "process_seconds": 12.5}
    return {kind: both | figures[kind] | dict(changes.get(kind, {})) for kind in KINDS}


def test_the_counted_work_is_what_torch_counts(tmp_path: Path) -> None:
    build(TINY, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", experts_implementation="eager"
    )
    tokens = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_decoder()(input_ids=torch.arange(tokens).view(1, -1), use_cache=False)
    work = work_of(TINY, tokens)
    # Without Flash Attention torch computes the masked half as well.
    counted = tokens * TINY["num_hidden_layers"] * (work.matrices + work.attention_full)
    # Older transformers take the angles of the rotary embedding as a product of matrices: of a column and a row.
    assert counter.get_total_flops() - counted in (0, 2 * tokens * TINY["head_dim"] // 2)
    assert work.attention_causal == work.attention_full // 2


def test_the_work_of_the_real_shape_is_that_of_its_published_size() -> None:
    """Qwen3-30B-A3B: 3.3 billion active parameters, of which embeddings and head are 0.6."""
    config = config_of("qwen3-30b-a3b")
    active = work_of(config, 2048).matrices / 2 * config["num_hidden_layers"]
    assert active + 2 * config["vocab_size"] * config["hidden_size"] == pytest.approx(3.3e9, rel=0.03)


def test_a_checkpoint_is_whole_or_built_anew(tmp_path: Path) -> None:
    assert {"mid", "qwen3-30b-a3b", "tiny"} <= set(shape_names())
    config = config_of("tiny", layers=2)
    folder = tmp_path / "model"
    assert not is_built(folder, config)
    build(config, folder)
    assert is_built(folder, config)
    assert not is_built(folder, config_of("tiny", layers=3))
    assert len(weight_files(folder)) == 3
    # The experts of a layer in bfloat16, its attention, router and norms, and the header of the file.
    experts, attention = 16 * 3 * 128 * 64, 128 * (2 * 128 + 2 * 64)
    assert 0 < layer_bytes(folder) - 2 * (experts + attention + 16 * 128 + 2 * 128 + 2 * 32) < 16384
    (folder / "model.safetensors.index.json").unlink()
    assert not is_built(folder, config)


def test_ratios_are_taken_within_rounds() -> None:
    slow = one_round(forward={"seconds": 20.0}, score={"seconds": 24.0}, run={"seconds": 30.0})
    figures = compare([one_round(), slow, one_round(score={"seconds": 13.0})], MODEL)
    assert figures["score_over_forward"] == 1.2
    assert figures["run_over_forward"] == 1.2
    assert figures["score_over_forward_cpu"] == 2.0
    assert figures["score_over_forward_process"] == 1.2
    assert figures["score_over_forward_computing"] == round(13 / 8, 3)
    assert figures["seconds_each"]["forward"] == [10.0, 20.0, 10.0]


def test_the_floor_is_what_takes_longest() -> None:
    assert floor_seconds(one_round()) == ("forward", 10.0)
    assert floor_seconds(one_round(read={"seconds": 11.0})) == ("read", 11.0)
    writing = one_round(copy={"seconds": 24.0, "bytes": 2 * MIB})
    assert floor_seconds(writing) == ("write", 24.0)
    figures = compare([writing], MODEL)
    assert (figures["floor_set_by"], figures["floor_seconds"], figures["run_over_floor"]) == ("write", 24.0, 0.5)


def test_the_memory_bound_is_two_layers_the_states_and_what_the_libraries_take() -> None:
    bound = 2 * MIB + 100 * 128 * 2 + int(0.7 * 1024**3)
    assert MODEL.memory_bound == bound
    kept = compare([one_round()], MODEL)
    assert kept["memory_bound_kept"] is True
    assert kept["peak_over_bound"]["run"] == round(100 * MIB / bound, 3)
    assert kept["memory_bound_mib"] == round(bound / MIB)
    broken = compare([one_round(), one_round(run={"peak_bytes": bound + 1})], MODEL)
    assert broken["memory_bound_kept"] is False


def test_the_achieved_share_is_of_the_same_round() -> None:
    fast = one_round(score={"seconds": 22.0}, matrix={"flop_per_second": 500.0, "seconds": 2.5})
    figures = compare([one_round(), fast], MODEL)
    # 100 tokens through 4 layers of 11 FLOP, over 11 seconds of 1,000 FLOP, or 22 seconds of 500.
    assert figures["achieved_share"] == 0.4
    assert figures["tokens_per_second"]["score"] == round(100 / 16.5)


def test_busy_shares_and_peaks_on_the_gpu_are_given_where_they_are() -> None:
    assert busy([one_round()]) == {}
    rounds = [one_round(run={"summary": {"busy": {"read": share, "seconds": 9.0}}}) for share in (0.2, 0.9, 0.4)]
    assert busy(rounds) == {"run": {"read": 0.4, "seconds": 9.0}}
    gpu = {"vram_allocated_bytes": 3 * MIB, "vram_reserved_bytes": 5 * MIB}
    layers = {**gpu, "layers": [{"seconds": 1.0, "peak_bytes": 4 * MIB}]}
    figures = gpu_figures([one_round(score=gpu, run=layers)], ("score", "run"))
    assert figures == {"peak_vram_mib": {"score": 3, "run": 4}, "peak_vram_reserved_mib": {"score": 5, "run": 5}}


def test_peaks_on_the_gpu_outlive_a_new_count(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"allocated": 7, "reserved": 9}
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: held["allocated"])
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda _: held["reserved"])
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda _: held.update(allocated=1, reserved=9))
    peaks = GpuPeaks("cuda:0")
    torch.accelerator.reset_peak_memory_stats("cuda:0")
    assert held["allocated"] == 1
    held["reserved"] = 12
    assert peaks.figures() == {"vram_allocated_bytes": 7, "vram_reserved_bytes": 12}


def test_all_layers_are_extrapolated_from_those_after_the_second() -> None:
    figures = extrapolate([9.0, 5.0, 1.0, 3.0, 2.0], 25.0, layers=50, scale_rest=False)
    assert figures["seconds_per_layer"] == 2.0
    assert figures["seconds_beside_layers"] == 5.0
    assert figures["seconds_for_all_layers"] == 100.0
    assert figures["seconds_for_the_model"] == 105.0
    assert extrapolate([9.0, 5.0, 1.0, 3.0, 2.0], 25.0, 50, scale_rest=True)["seconds_for_the_model"] == 150.0
    with pytest.raises(ProcessError, match="give --layers 3"):
        extrapolate([1.0, 1.0], 2.0, 50, scale_rest=False)


def test_files_are_read_copied_and_dropped_from_the_page_cache(flushed: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    sizes = {"a": 0, "inner/b": 5 * mmap.PAGESIZE + 1}
    for name, size in sizes.items():
        (source / name).write_bytes(os.urandom(size))
    files = [source / name for name in sizes]
    assert read_all(files) == sum(sizes.values())
    assert cached_share(files) == 1.0
    assert copy_and_sync(source, tmp_path / "copied") == sum(sizes.values())
    assert (tmp_path / "copied" / "inner" / "b").read_bytes() == (source / "inner" / "b").read_bytes()
    # Memory file systems keep what they hold; elsewhere nothing may be left.
    left = drop_from_page_cache(files)
    assert left == cached_share(files)
    assert left in (0.0, 1.0)


def test_a_process_that_fails_or_hangs_ends_with_all_it_started(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"exit status 2: --keep 0 is bad"):
        run_process(["sh", "-c", "echo noise >&2; echo 'Error: --keep 0 is bad' >&2; echo more >&2; exit 2"])
    assert run_process(["sh", "-c", "echo $MORE; exit 3"], accepted=(3,), more={"MORE": "told"}) == "told\n"
    number = tmp_path / "number"
    with pytest.raises(ProcessError, match="not done after"):
        run_process(["sh", "-c", f"sleep 60 & echo $! > {number}; wait"], timeout=0.5)
    # Gone, or dead and waiting for whoever looks after orphans here.
    left = int(number.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_a_job_is_the_same_behind_the_command_line() -> None:
    job = Job("run", Path("a b"), Path("c"), Path("d"), "cuda:1", vram_gib=2.5)
    assert Job.parse(job.text()) == job
    assert Job.parse(replace(job, vram_gib=None).text()).vram_gib is None


def test_scores_of_several_processes_are_compared(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 2.0], [0.0, -4.0]], dtype=torch.float64)
    paths = [tmp_path / name for name in ("one", "two", "three")]
    save_file({"statistics": values}, paths[0])
    save_file({"statistics": values * torch.tensor([1.0, 1 + 1e-9], dtype=torch.float64)}, paths[1])
    save_file({"others": values}, paths[2])
    one, two, three = paths
    assert several.difference(one, one) == 0.0
    assert several.difference(one, two) == pytest.approx(1e-9, rel=1e-3)
    assert several.difference(one, three) == float("inf")
    assert several.launch(1) == [sys.executable, "-m", "streamprune"]
    assert several.launch(2)[-2:] == ["-m", "streamprune"]
    assert "--nproc-per-node" in several.launch(2)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/bench as a user runs it, with one thread."""
    command = [sys.executable, str(ROOT / "tools" / "bench"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--processes", "1"], "give 2 or more"), (["--samples", "0"], "too small"), (["--shape", "none"], "choose from")],
)
def test_numbers_without_sense_are_refused(arguments: list[str], words: str) -> None:
    done = run_program("bench", *arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


@thorough
def test_the_bench_measures_everything_in_one_run(tmp_path: Path) -> None:
    saved = tmp_path / "figures.json"
    done = bench(
        "--shape", "tiny", "--layers", "2", "--samples", "4", "--seq-len", "64", "--rounds", "1", "--cold",
        "--busy", "--depths", "3", "--output", str(saved),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(saved.read_text())
    assert json.loads(done.stdout) == figures
    assert (figures["shape"], figures["layers"], figures["tokens"]) == ("tiny", 2, 256)
    assert figures["page_cache"] == "dropped before each process"
    assert set(figures["seconds_each"]) == set(KINDS) - {"matrix"}
    forward, run = figures["seconds_each"]["forward"][0], figures["seconds_each"]["run"][0]
    assert figures["run_over_forward"] == pytest.approx(run / forward, rel=0.01)
    # Half of the experts left, and all of the rest.
    assert 0.4 < figures["output_mib"] / figures["weights_mib"] < 0.9
    assert figures["floor_seconds"] >= max(figures["read_seconds"], figures["copy_seconds"]) - 0.001
    assert figures["memory_bound_kept"] is True
    assert 100 < figures["import_peak_mib"] < figures["peak_mib"]["score"]
    assert 0 < figures["achieved_share"] < 1
    assert figures["matrix_rate_tflops"] > figures["achieved_tflops"]
    assert list(figures["peak_mib_by_layers"]) == ["3"]
    assert figures["depth_growth_in_layers"] == 0
