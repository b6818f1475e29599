"""tools/check_clients without a client: its options, the comparison, and what is told of answers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from clients.answers import LENGTHS, VOCABULARY, Answer, Failure, difference, load, prompts, same_tokens, save

TOOL = Path(__file__).parent.parent / "tools" / "check_clients"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The program as a module."""
    loader = importlib.machinery.SourceFileLoader("check_clients", str(TOOL))
    spec = importlib.util.spec_from_loader("check_clients", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_clients"] = module
    loader.exec_module(module)
    return module


def answer(*rows: list[float] | None, greedy: list[int] | None = None) -> Answer:
    return Answer([list(rows)], [greedy or [5, 6]])


def test_the_difference_is_the_largest_of_rows_that_both_have() -> None:
    one = answer([-1.0, -2.0], None, [-1.0, -3.0])
    assert difference(one, answer([-1.0, -2.5], [-9.0, -9.0], [-1.25, -3.0])) == 0.5
    # A program that says nothing behind the last token.
    assert difference(one, answer([-1.0, -2.0], [-9.0, -9.0])) == 0.0
    assert difference(one, answer(None, [0.0, 0.0])) == math.inf
    for bad in (math.nan, -math.inf):
        for place in (0, 1):
            row = [-1.0, -2.0]
            row[place] = bad
            assert difference(one, answer(row)) == math.inf
            assert difference(answer(row), one) == math.inf
    with pytest.raises(ValueError, match="shorter"):
        difference(one, answer([-1.0]))


def test_greedy_tokens_count_up_to_the_end() -> None:
    assert same_tokens(answer(greedy=[5, 6, 7]), answer(greedy=[5, 6, 7]))
    assert not same_tokens(answer(greedy=[5, 6, 7]), answer(greedy=[5, 6, 8]))
    assert same_tokens(answer(greedy=[5, 2, 7]), answer(greedy=[5, 2, 8]))
    assert not same_tokens(answer(greedy=[5, 2, 7]), answer(greedy=[5, 6, 2]))
    # A program that is told never to end.
    assert same_tokens(answer(greedy=[5, 6, 7]), answer(greedy=[5, 2, 7]))


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    for result in (answer([-0.5], None), Failure("no", no_kernel=True)):
        save(result, tmp_path / "result.json")
        assert load(tmp_path / "result.json") == result


def test_prompts_are_the_same_in_every_process() -> None:
    assert prompts() == prompts()
    assert [len(ids) for ids in prompts()] == list(LENGTHS)
    assert all(2 < token < VOCABULARY for ids in prompts() for token in ids)


@pytest.fixture
def case(tool: ModuleType, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Makes a case with the answers of programs."""

    def make(weights: str, **answers: Answer | Failure):  # type: ignore[no-untyped-def]
        made = tool.Case("qwen3_moe", weights, tmp_path / weights)
        for by, result in answers.items():
            save(result, tool.beside(made.folder, by.replace("_", "-")))
        return made

    return make


def test_a_result_fails_where_its_source_holds(tool, case, capsys) -> None:  # type: ignore[no-untyped-def]
    good, off = answer([-1.0]), answer([-1.5])
    source = case(tool.SOURCE, transformers=good, vllm=good)
    right, wrong = case("source", transformers=good, vllm=good), case("bf16", transformers=good, vllm=off)
    unmade = case("fp8", transformers=Failure("SettingsError: no"))
    assert tool.report([source, right, wrong, unmade], 1e-3) == ["qwen3_moe bf16 in vLLM", "qwen3_moe fp8 in vLLM"]
    table = capsys.readouterr().out
    assert "| qwen3_moe | bf16 | 5e-01, **differs** |  |" in table
    assert "| qwen3_moe | fp8 | no reference: SettingsError: no |  |" in table
    # Without a control nothing can be said.
    assert tool.report([case(tool.SOURCE, transformers=good, vllm=off), wrong], 1e-3) == []
    # Each client has its own control.
    source = case(tool.SOURCE, transformers=good, vllm=off, llama=good)
    wrong = case("source", transformers=good, vllm=off, llama=Failure("no"))
    assert tool.report([source, wrong], 1e-3) == ["qwen3_moe source in llama.cpp"]


def test_drafted_tokens_have_to_be_the_same(tool, case) -> None:  # type: ignore[no-untyped-def]
    good, other = answer([-1.0]), answer(greedy=[5, 7])
    for drafted, holds, told in [
        (Answer([], good.greedy, 9), True, "0e+00; 9 tokens drafted"),
        (Answer([], good.greedy, 0), False, "0e+00; 0 tokens drafted"),
        (Answer([], other.greedy, 9), False, "0e+00; 9 tokens drafted, **other greedy tokens**"),
        (Failure("no such layer"), False, "0e+00; drafting: no such layer"),
    ]:
        found = tool.judge(case("source", transformers=good, vllm=good, vllm_drafting=drafted), 1e-3)
        assert found["vLLM"] == (holds, told)


def test_decoded_weights_decide_where_there_is_no_kernel(tool, case) -> None:  # type: ignore[no-untyped-def]
    good, off, refused = answer([-1.0]), answer([-1.5]), Failure("no kernel", no_kernel=True)

    def by_vllm(name: str, plain: Answer | Failure, decoded: Answer) -> tuple[bool, str, str]:
        found: tuple[bool, str, str] = tool.by_vllm(
            case(name, transformers=good, vllm=plain, vllm_decoded=decoded), good, 1e-3
        )
        return found

    assert by_vllm("a", refused, good) == (True, "0e+00", "none here: no kernel")
    assert not by_vllm("b", refused, off)[0]
    # Kernels round activations, so that how far they are is told, and does not decide.
    assert by_vllm("c", off, good) == (True, "0e+00", "5e-01")
    assert not by_vllm("d", Failure("crash"), good)[0]


def test_what_failed_is_tried_again(tool, case, tmp_path) -> None:  # type: ignore[no-untyped-def]
    good, refused = answer([-1.0]), Failure("no kernel", no_kernel=True)
    kept = case("kept", transformers=good, vllm=refused, vllm_decoded=good)
    failed = case("failed", transformers=good, vllm=refused, vllm_decoded=Failure("the process died"))
    tool.forget_failures(tmp_path.parent)
    assert all(tool.beside(kept.folder, by).exists() for by in ("transformers", "vllm", "vllm-decoded"))
    assert not any(tool.beside(failed.folder, by).exists() for by in tool.PROGRAMS)


def test_options(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = tool.parse(["--vllm", sys.executable])
    assert "qwen3_moe" in options.families
    assert options.weights == ["source", "fp8", "fp8-dynamic", "w8a16", "w4a16"]
    for wrong, told in [
        (["--vllm", "nowhere/python"], "nowhere/python is no program"),
        ([], "--vllm, --llama, or both"),
        (["--llama", sys.executable], "--llama-source"),
        (["--vllm", sys.executable, "--families", "gpt2"], "gpt2"),
    ]:
        with pytest.raises(SystemExit):
            tool.parse(wrong)
        assert told in capsys.readouterr().err
