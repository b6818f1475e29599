"""tools/gpu_check on the CPU: its parts, what it saves, and that a part which fails costs no other.

But for one run as a user starts it, the parts run within this process: importing torch anew takes them longest.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from measuring import check as checking
from measuring import forking, processes, rate, session, streamed, workers
from measuring import parts as measured_parts
from measuring.check import Check
from measuring.forking import Forked
from measuring.parts import PARTS, SMOKE, Part
from measuring.processes import Job, ProcessError, run_process
from measuring.session import MOST_BYTES, after_failure, as_text, measure_all
from measuring.shapes import ROOT, build, config_of
from measuring.summaries import LINES, summary
from measuring.watching import SYNCHRONIZING, SyncWarnings

from streamprune.hardware import half_precision
from tests.programs import run_program

SETTINGS: dict[str, Any] = {
    "shape": "tiny", "layers": 3, "samples": 6, "run_samples": 4, "bench_samples": 4, "ram_samples": 4,
    "fit_samples": 2, "more_samples": 4, "seq_len": 64, "forward_batch": 1, "device": "cpu", "vram_gib": None,
    "states": "auto", "budget_gib": None, "context": 128,
}  # fmt: skip
HEAD = {"device": "cpu"}


def gpu_check(*arguments: str) -> CompletedProcess[str]:
    return run_program("gpu_check", "--device", "cpu", "--shape", "tiny", *arguments)


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The jobs of the parts are done in this process, and in little time."""

    def do(job: Job, timeout: float | None = None) -> dict[str, Any]:
        # By way of JSON, as from another process.
        return dict(json.loads(json.dumps(workers.do(Job.parse(job.text())))))

    with pytest.MonkeyPatch.context() as patch:
        for module in (checking, measured_parts, streamed):
            patch.setattr(module, "work", do)
        patch.setattr(rate, "SECONDS", {"cpu": (0.0, 0.02)})
        yield


def check_in(folder: Path, seconds: float = 1000.0, **changes: Any) -> Check:
    """A small check, with so many seconds left."""
    return Check(**{**SETTINGS, **changes}, folder=folder, deadline=time.monotonic() + seconds)


@pytest.fixture(scope="module")
def saved(in_process: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is saved of all parts but `fit`, whose commands are processes of their own."""
    folder = tmp_path_factory.mktemp("check")
    path = folder / "check.json"
    names = [name for name in PARTS if name != "fit"]
    assert measure_all(names, check_in(folder / "work"), HEAD, {}, path) == []
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_user_gets_a_line_for_each_part_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    path.write_text(json.dumps({"device": "cpu", "parts": {"fit": {"budget_gib": 1}}}))
    done = gpu_check("--parts", "machine", "smoke", "--output", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["machine", "smoke"]
    assert lines[1] == "smoke: skipped: needs a GPU"
    figures = json.loads(path.read_text())
    assert (figures["device"], figures["torch"]) == ("cpu", torch.__version__)
    # What was saved before stays.
    assert set(figures["parts"]) == {"fit", "machine", "smoke"}
    # (Of torch's builds for GPUs the package's version lacks the kind of build.)
    assert figures["parts"]["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert figures["parts"]["machine"]["free_ram_gib"] > 0
    assert not list(tmp_path.glob("*.part"))


def test_when_and_with_what_is_saved(saved: dict[str, Any]) -> None:
    assert list(saved["parts"]) == [name for name in PARTS if name != "fit"]
    for part in saved["parts"].values():
        assert part["date"].count("-") == 2
        assert part["settings"]["shape"] == "tiny"
        assert "folder" not in part["settings"]
    for name in ("smoke", "ram", "tests"):
        assert saved["parts"][name]["skipped"] == "needs a GPU"
    assert saved["checkpoint"]["seconds"] >= 0


@pytest.mark.parametrize("kind", ["score", "run"])
def test_scoring_is_extrapolated_to_the_whole_model(kind: str, saved: dict[str, Any]) -> None:
    found = saved["parts"][kind]
    assert (
        found["tokens"]
        == found["summary"]["calibration_tokens"]
        == SETTINGS["samples" if kind == "score" else "run_samples"] * 64
    )
    assert len(found["seconds_of_layers"]) == 3
    # The shape has four layers; of the three that were built the last one counts.
    assert found["layers_of_the_model"] == 4
    assert found["seconds_per_layer"] == pytest.approx(found["seconds_of_layers"][2], abs=0.001)
    assert found["seconds_for_all_layers"] == pytest.approx(4 * found["seconds_per_layer"], abs=0.01)
    assert found["seconds_for_the_model"] >= found["seconds_for_all_layers"]
    assert 0 < found["achieved_share"] < 1
    assert found["achieved_share"] == pytest.approx(found["achieved_tflops"] / found["matrix_rate_tflops"], rel=0.2)
    assert min(found["read_gb_per_second"], found["own_read_gb_per_second"]) > 0
    assert found["peak_mib"] > 100
    # One before each layer but the first; those that count are before the layers that count.
    assert len(found["gaps"]) == 2
    assert 0 < found["gap_seconds"] == pytest.approx(found["gaps"][1])
    assert "largest layer" in found["plan"]
    assert found["sync_warnings"]["count"] == 0


def test_a_few_layers_tell_of_other_runs(saved: dict[str, Any]) -> None:
    """Narrower, refitted and quantized ones, and of a source in FP8."""
    for name in ("narrow", "refit", "fp8", "w4a16", "from-fp8"):
        found = saved["parts"][name]
        assert (len(found["seconds_of_layers"]), found["layers_of_the_model"]) == (3, 4), name
        assert found["tokens"] == SETTINGS["more_samples"] * 64
        assert "s/layer" in summary(name, found)
    # Half of the bytes, but for scales and what lies around the matrices.
    assert saved["parts"]["from-fp8"]["layer_mib"] < 0.7 * saved["parts"]["narrow"]["layer_mib"]


def test_a_part_is_skipped_without_the_library_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    assert session.measure("fp8", check_in(tmp_path))["skipped"] == "this Python has no compressed_tensors"
    assert not list(tmp_path.iterdir())


def test_the_tests_on_a_gpu_can_be_collected_where_only_the_package_s_own_libraries_are() -> None:
    """Those that `smoke` names are there, and no test file with a `gpu` test imports what is an extra."""
    written = (ROOT / "tests/test_gpu.py").read_text()
    assert all(f"def {test.partition('::')[2].partition('[')[0]}(" in written for test in SMOKE)
    extras = {"compressed_tensors", "gguf", "datasets", "lm_eval", "hypothesis"}
    files = measured_parts.gpu_files()
    assert {"tests/test_gpu.py", "tests/test_gpu_formats.py"} <= set(files)
    assert {path: extras & imported(path, set()) for path in files} == {path: set() for path in files}


def imported(path: str, seen: set[str]) -> set[str]:
    """What a test file imports as it begins, and the test files that it imports in turn."""
    seen.add(path)
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            found = [each.name for each in node.names]
        else:
            continue
        names |= {each.partition(".")[0] for each in found}
        files = [f"{each.replace('.', '/')}.py" for each in found if each.startswith("tests")]
        for file in files:
            if file not in seen and (ROOT / file).is_file():
                names |= imported(file, seen)
    return names


def test_the_profile_looks_at_what_a_run_computes(saved: dict[str, Any]) -> None:
    found = saved["parts"]["profile"]
    assert (found["tokens"], found["layer"]) == (6 * 64, 1)
    assert [name for name, value in found.items() if isinstance(value, dict) and "error" in value] == []
    assert found["outputs"]["experts"]["recorded_twice_the_same_to_the_bit"] is True
    assert found["outputs"]["layer"]["max_difference_over_max"] < 0.01
    assert found["timing"]["recording_over_plain"] > 0
    assert found["timing"]["recording_by_torch_over_plain"] > 0
    assert found["timing"]["pair_kernel"] == [], "on the CPU there is nothing to choose"
    assert len(found["part_sizes"]["ms"]) == 5
    assert 0 < len(found["kernels"]["top"]) <= 25
    assert all(len(name) <= 80 for name, _, _ in found["kernels"]["top"])


def test_the_bench_is_over_a_forward_of_the_same_tokens(saved: dict[str, Any]) -> None:
    found = saved["parts"]["bench"]
    assert (found["layers"], found["tokens"]) == (3, 4 * 64)
    assert found["summary"]["calibration_tokens"] == found["tokens"]
    assert found["score_over_forward"] == pytest.approx(found["score_seconds"] / found["forward_seconds"], rel=0.05)


def test_a_result_is_planned_for_a_budget_that_half_of_the_experts_need(in_process: None, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []
    answers: list[dict[str, Any]] = [
        {"total_bytes": 2**30},
        {"experts_per_layer": 8},
        {"total_bytes": 2**30, "total_bytes_low": 1, "total_bytes_high": 2, "terms": []},
    ]

    def answer(check: Check, *arguments: str) -> dict[str, Any]:
        asked.append(arguments)
        return answers[len(asked) - 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_parts, "_streamprune", answer)
        found = session.measure("fit", check_in(tmp_path))
    assert [each[0] for each in asked] == ["fit", "run", "fit"]
    assert asked[0][-2:] == ("--keep", "8")
    assert asked[1][asked[1].index("--budget-gib") + 1] == "1.0"
    assert (found["budget_gib"], found["experts_per_layer"], found["measured"]) == (1.0, 8, None)
    assert "keep 8 experts" in summary("fit", found)


def test_parts_that_fail_are_recorded_and_cost_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(check: Check) -> dict[str, Any]:
        raise ProcessError("x" * 5000 + " and this is why")

    def breaks(check: Check) -> dict[str, Any]:
        raise KeyError("nobody thought of it")

    answers = {"score": fails, "run": breaks, "bench": lambda check: {"tokens": 1}}
    for name, answer in answers.items():
        monkeypatch.setitem(PARTS, name, Part(answer, 0, 100))
    parts = {"fit": {"budget_gib": 1}, "score": {"error": "older"}}
    path = tmp_path / "check.json"
    assert measure_all(["score", "run", "bench"], check_in(tmp_path), HEAD, parts, path) == ["score", "run"]
    found = json.loads(path.read_text())["parts"]
    assert set(found) == {"fit", "score", "run", "bench"}
    assert found["fit"] == {"budget_gib": 1}
    assert found["score"]["error"].endswith("and this is why")
    assert "nobody thought of it" in found["run"]["error"]
    lines = capsys.readouterr().out
    assert lines.count("FAILED") == 2
    assert "and this is why" in lines
    assert len(lines) < 6000


def test_all_parts_share_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime))
    given = []

    def slow(check: Check) -> dict[str, Any]:
        given.append(check.deadline - clock[0])
        clock[0] += 60
        return {}

    for name, least, most in (("score", 30, 90), ("run", 30, 50), ("bench", 30, 90)):
        monkeypatch.setitem(PARTS, name, Part(slow, least, most))
    parts: dict[str, Any] = {"bench": {"score_over_forward": 1.1}}
    check = replace(check_in(tmp_path, device="cuda:0"), deadline=1140.0)
    assert measure_all(["score", "run", "bench", "fit"], check, HEAD, parts, None) == []
    # Each has what it may take at most, and no more than is left.
    assert given == [90, 50]
    assert "20 s are left" in parts["fit"]["skipped"]
    # Figures of an earlier command are not given away for that there was no time.
    assert parts["bench"] == {"score_over_forward": 1.1}


def test_where_the_smoke_tests_fail_the_profile_comes_next() -> None:
    waiting = ["score", "run", "profile", "bench"]
    assert after_failure("smoke", waiting) == ["profile", "score", "run", "bench"]
    assert after_failure("score", waiting) == waiting
    assert after_failure("smoke", ["score"]) == ["score"]


def test_what_is_saved_stays_small() -> None:
    figures = {"parts": {str(number): {"error": "x" * 10**5, "rows": [["y" * 300] * 3] * 200} for number in range(20)}}
    text = as_text(figures)
    assert len(text.encode()) < MOST_BYTES
    assert set(json.loads(text)["parts"]) == set(figures["parts"])
    few = {"parts": {"a": {"error": "short"}}}
    assert json.loads(as_text(few)) == few


def test_figures_of_another_device_and_other_files_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    for content, words in (('{"device": "NVIDIA A", "parts": {}}', "has figures of NVIDIA A"), ("[1]", "was not made")):
        path.write_text(content)
        done = gpu_check("--parts", "tests", "--output", str(path))
        assert done.returncode == 1
        assert done.stderr.count("Error:") == 1
        assert words in done.stderr
        assert path.read_text() == content


@pytest.mark.parametrize(("slowdown", "dtype"), [(9.0, "float32"), (1.0, "bfloat16")])
def test_the_rate_is_that_of_what_a_run_computes_in(
    slowdown: float, dtype: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "slowdown", lambda dtype: slowdown)
    monkeypatch.setattr(rate, "SIZES", {"cpu": 8})
    found = rate.matrix_rate("cpu")
    assert (found["dtype"], found["size"]) == (dtype, 8)
    assert found["flop_per_second"] > 0


@pytest.mark.skipif(torch.cuda.device_count() > 50, reason="there is such a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_line() -> None:
    done = gpu_check("--device", "cuda:50", "--parts", "score")
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "so that there is no cuda:50" in done.stderr


def test_every_part_is_described_in_the_help() -> None:
    text = gpu_check("--help").stdout
    assert all(f"| {name} |" in text for name in PARTS)
    assert set(LINES) == set(PARTS)


def test_what_an_earlier_part_left_is_not_gone_on_with(tmp_path: Path) -> None:
    check = check_in(tmp_path, layers=2, samples=2, seq_len=8)
    build(config_of("tiny", 2), tmp_path / "model")
    whole = (tmp_path / "model" / "model.safetensors.index.json").stat()
    (tmp_path / "output.safetensors.work").mkdir()
    (tmp_path / "output.streamprune.log").touch()
    job = check.job("score")
    assert not list(tmp_path.glob("output*"))
    # The checkpoint was there, and is used again.
    assert (job.model / "model.safetensors.index.json").stat() == whole
    assert [len(json.loads(line)["input_ids"]) for line in job.tokens.read_text().splitlines()] == [8, 8]
    with pytest.raises(ProcessError, match="the time is over"):
        _ = replace(check, deadline=time.monotonic()).left


STARTS = "import subprocess as s; print(s.Popen(['sleep', '1000'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"


@pytest.mark.parametrize("run", [lambda code: run_process([sys.executable, "-c", code]), lambda code: forked(code)])
def test_what_a_process_has_started_ends_with_it(run: Callable[[str], str]) -> None:
    """Also where it has ended by itself before."""
    assert has_ended(int(run(STARTS)))


def has_ended(pid: int) -> bool:
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    return bool(gone) or not psutil.pid_exists(pid)


def forked(code: str, **options: Any) -> str:
    return processes.run_forked(["-c", code], **options)


def test_a_forked_process_has_its_libraries_and_is_told_of_like_another() -> None:
    assert forked("import sys; print(sys.modules['transformers'].__name__, *sys.argv)") == "transformers -c\n"
    assert forked("import os; print(os.environ['STREAMPRUNE_REPORT']); exit(3)", accepted=(0, 3)) == "0\n"
    assert "usage: " in processes.run_forked(["-m", "json.tool", "--help"])
    with pytest.raises(ProcessError, match=r"exit status 1: --keep 0 is bad$"):
        forked("import sys; print('noise', file=sys.stderr); sys.exit('Error: --keep 0 is bad')")
    with pytest.raises(ProcessError, match=r"exit status -9:"):
        forked("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ProcessError, match=r"Traceback[\s\S]*KeyError: 'nobody thought of it'"):
        forked("raise KeyError('nobody thought of it')")


def test_a_forked_process_that_is_not_done_in_time_ends_with_all_it_started(tmp_path: Path) -> None:
    written = tmp_path / "number"
    code = STARTS.replace("stderr=s.DEVNULL", "stderr=s.DEVNULL, start_new_session=True")
    code = code.replace("print(", "from pathlib import Path; p = Path('number.part'); p.write_text(str(")
    code += "); p.rename('number'); import time; time.sleep(1000)"
    process = Forked(["-c", code], tmp_path, processes.environment({}))
    while not written.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    with pytest.raises(ProcessError, match="python x was not done after 0 s"):
        processes._printed(process, ["python", "x"], 0.0, (0,))
    assert has_ended(int(written.read_text()))
    assert process.returncode == -signal.SIGKILL


def test_what_cannot_be_forked_is_an_interpreter_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA was used before the fork, which it does not survive, and where there is nothing to fork."""
    new = "import sys; print('torch' in sys.modules, *sys.argv)"
    lost = (
        "import os; from measuring import forking; from pathlib import Path\n"
        "forking._cuda_is_lost, os.setsid = lambda: True, lambda: None\n"
        f"forking._run(['-c', {new!r}], Path(), dict(os.environ), [])"
    )
    assert forked(lost) == "False -c\n"
    monkeypatch.setattr(forking.forkserver, "ensure_running", lambda: os.read(-1, 1))
    assert forked(new) == "False -c\n"


def test_a_library_that_is_broken_keeps_no_other_from_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in (("is_broken_here", "1 / 0"), ("is_whole_here", "")):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(forking, "_IMPORTED", ("is_missing_here", "is_broken_here", "is_whole_here"))
    forking.import_libraries()
    assert "is_whole_here" in sys.modules
    del sys.modules["is_whole_here"]


def test_no_process_makes_a_report() -> None:
    assert run_process(["sh", "-c", "echo $STREAMPRUNE_REPORT"]).strip() == "0"


def test_waits_for_the_gpu_are_counted_by_their_places() -> None:
    heard = SyncWarnings("cuda:0")
    for line in (5, 5, 7):
        heard._count(f"x {SYNCHRONIZING} (function)", UserWarning, "/somewhere/torch/nn/thing.py", line)
    heard._count("of something else", UserWarning, "/somewhere/else.py", 1)
    counts = heard.counts()
    assert counts["count"] == 3
    assert list(counts["places"].values()) == [2, 1]
