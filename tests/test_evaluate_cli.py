"""`streamprune eval` as its users meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import Qwen3Config, Qwen3ForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.reporting.evaluations import TEXT_NAME, name_against, read_result
from tests.helpers import known_family, load_whole, prune
from tests.reports import tables
from tests.test_evaluate import in_memory
from tests.tiny import make_model, tiny_config, write_token_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `out` made of it, and held-out text."""
    folder = tmp_path_factory.mktemp("made")
    model = make_model(folder / "model", tiny_config(known_family("qwen3_moe")))
    write_token_ids(folder / "ids.jsonl", sequences=4)
    prune(model, folder / "out", keep=4, calibration=(str(folder / "ids.jsonl"),))
    write_token_ids(folder / "held.jsonl", sequences=5, seed=9)
    return folder


def called(*words: Any) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def refused(*words: Any, status: int = 1) -> str:
    """The one line that is said, and nothing else."""
    result = called(*words)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_one_object_with_sources_is_printed_and_left_with_our_own_models(made: Path) -> None:
    given = [made / "out", "--against", made / "model", "--data", made / "held.jsonl", "--dtype", "float32"]
    result = called(*given, "--json", "--no-report")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    (source,) = told["sources"]
    expected = in_memory(load_whole(made / "out"), load_whole(made / "model"), made / "held.jsonl")
    assert {name: source[name] for name in expected} == pytest.approx(expected, abs=1e-6, rel=1e-6)
    for name in ("loss", "perplexity", "kl", "top1_agreement"):
        low, high = source[f"{name}_interval"]
        assert low <= source[name] <= high
    assert (source["name"], source["tokens"], source["sequences"]) == ("held.jsonl", 5 * 23, 5)
    assert read_result(made / "out" / "evaluation", TEXT_NAME) == told
    assert f"results: {made / 'out' / 'evaluation' / TEXT_NAME}" in result.stderr
    assert (told["data"]["held_back"], told["against_source"]) == (False, True)
    shown = called(*given, "--no-report", "--quiet")
    assert shown.stderr == ""
    rows = shown.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["source", "held.jsonl"]
    assert f"{source['kl']:.4f}" in rows[1]


def test_everything_asked_for_is_in_the_report_and_on_the_card(made: Path, tmp_path: Path) -> None:
    """The files as the evaluation writes them, read by what makes the report."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    given = [out, "--against", made / "model", "--data", made / "held.jsonl", "--generate", "--max-new-tokens", 70]
    result = called(*given, "--prompts-per-source", 1, "--prompt-tokens", 8, "--report", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert result.stderr.splitlines()[-1] == f"report: {out / 'report.html'}"
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert f"{told['sources'][0]['kl']:.3g}" in page
    assert [mode["decoding"] for mode in told["generation"]["modes"]] == ["greedy", "sampled"]
    assert "greedy, text" in page
    assert "sampled, text, the original" in card
    assert "held.jsonl" in card
    for name in ("text.json", "generation.json"):
        assert str(made) not in (out / "evaluation" / name).read_text(), "it may be published"


def test_any_model_alone_is_measured_and_nothing_is_left(made: Path, tmp_path: Path) -> None:
    before = sorted(made.rglob("*"))
    result = called(made / "model", "--data", made / "held.jsonl", "--json", "--quiet", "--dtype", "float32")
    told = json.loads(result.stdout)
    assert told["against"] is None
    assert "kl" not in told["sources"][0]
    assert result.stderr == ""
    assert sorted(made.rglob("*")) == before
    called(made / "model", "--data", made / "held.jsonl", "-o", tmp_path / "here")
    assert read_result(tmp_path / "here", TEXT_NAME) is not None


def test_models_without_experts_are_measured_too(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    given = [tmp_path / "dense", "--against", made / "model", "--data", made / "held.jsonl", "--dtype", "float32"]
    told = json.loads(called(*given, "--json").stdout)
    expected = in_memory(load_whole(tmp_path / "dense"), load_whole(made / "model"), made / "held.jsonl")
    assert {name: told["sources"][0][name] for name in expected} == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert "hidden_error" not in told["all"], "they have different numbers of blocks"


def test_what_cannot_work_is_one_line(made: Path, tmp_path: Path) -> None:
    data = ["--data", made / "held.jsonl"]
    assert "No text to measure on: give --data" in refused(made / "out", status=2)
    other = tiny_config(known_family("qwen3_moe"))
    other.vocab_size = 300
    make_model(tmp_path / "other", other)
    assert "predicts 256 tokens and" in refused(made / "out", "--against", tmp_path / "other", *data, status=2)
    assert "--against-revision" in refused(made / "out", "--against-revision", "main", *data, status=2)
    assert "missing.jsonl" in refused(made / "out", "--data", tmp_path / "missing.jsonl")
    assert "nothing" in refused(tmp_path / "nothing", *data)
    (tmp_path / "short.jsonl").write_text('{"input_ids": [1]}\n')
    assert "has no sequence of two tokens" in refused(made / "out", "--data", tmp_path / "short.jsonl")
    quantized = shutil.copytree(made / "model", tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    assert "is quantized (hqq)" in refused(made / "out", "--against", quantized, *data)


def test_code_of_uneven_models_runs_only_when_it_is_trusted(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "uneven"
    prune(made / "model", out, keep=5, schedule="linear-decrease", calibration=(str(made / "ids.jsonl"),))
    words = refused(out, "--data", made / "held.jsonl")
    assert "add --trust-remote-code" in words
    result = called(out, "--against", made / "model", "--data", made / "held.jsonl", "--trust-remote-code", "--json")
    assert json.loads(result.stdout)["all"]["kl"] > 0


def test_what_compares_with_the_original_is_not_replaced_by_less(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    compared = called(out, "--against", made / "model", "--data", made / "held.jsonl", "--json", "--quiet")
    alone = called(out, "--data", made / "held.jsonl")
    assert "text.json is not replaced, since it compares with the original. Add --against, or -o." in alone.stderr
    assert read_result(out / "evaluation", TEXT_NAME) == json.loads(compared.stdout)


def test_a_comparison_with_another_model_than_the_source_is_kept_apart(made: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other model", tiny_config(known_family("qwen3_moe")), seed=7)
    # (Without what other tests measured.)
    out = shutil.copytree(made / "out", tmp_path / "out", ignore=shutil.ignore_patterns("evaluation"))
    results, data = out / "evaluation", ["--data", made / "held.jsonl", "--quiet"]
    name = name_against(TEXT_NAME, "other model", open_checkpoint(other).fingerprint())
    assert name.startswith("text-against-other-model-")
    told = called(out, "--against", other, "--data", made / "held.jsonl", "--report")
    assert f"note: {other} is not what {out} was made from, by the fingerprint in its streamprune.json" in told.stderr
    words = "On text that was given to `eval`, against other model, which is not what this model was made from; "
    assert words in (out / "README.md").read_text(), "shown where there is no other"
    assert sorted(path.name for path in results.iterdir()) == [name]
    called(out, "--against", made / "model", *data)
    own = read_result(results, TEXT_NAME)
    assert own is not None
    assert own["against_source"] is True
    called(out, "--against", other, *data, "--report")
    assert sorted(path.name for path in results.iterdir()) == [name, TEXT_NAME]
    assert read_result(results, TEXT_NAME) == own
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert 0 < card.index("given to `eval`, against the original; ") < card.index(words)
    titles = [
        page.index(f"Divergence from the original, nats per token{end}")
        for end in ("<", ", against other model, which is not what this model was made from")
    ]
    assert titles == sorted(titles)
    again = called(out, "--against", made / "model", "--data", made / "ids.jsonl")
    assert "text.json, which replaces those on other text" in again.stderr


def test_what_the_run_held_out_stays_beside_other_text(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_token_ids(tmp_path / "ids.jsonl", sequences=20)
    prune(made / "model", out, keep=4, evaluate=True, calibration=(str(tmp_path / "ids.jsonl"),))
    own = read_result(out / "evaluation", TEXT_NAME)
    told = called(out, "--against", made / "model", "--data", made / "held.jsonl", "--report")
    assert told.exit_code == 0, told.output
    assert read_result(out / "evaluation", TEXT_NAME) == own
    [name] = [path.name for path in (out / "evaluation").iterdir() if path.name.startswith("text-on-held.jsonl-")]
    assert f"results: {out / 'evaluation' / name}" in told.stderr
    card = (out / "README.md").read_text()
    held, given = (
        card.index(f"On text that was {words}") for words in ("held out of the calibration", "given to `eval`")
    )
    assert held < given
    assert "| all |" not in card, "each text has one source, whose figures they would be again"
    assert [row[0] for row in tables(out).rows("Loss, nats per token")] == ["ids.jsonl"]


def test_models_that_are_not_there_are_told_before_the_text(tmp_path: Path) -> None:
    assert "nothing" in refused(tmp_path / "nothing")
