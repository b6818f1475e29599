"""`streamprune fit` on the command line: answers, exit statuses, messages, and what it need not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamprune.cli import main
from streamprune.fit import structure
from streamprune.fit.footprint import read_model
from streamprune.fit.positions import max_positions
from streamprune.fit.verdict import verdict
from streamprune.hardware.gpus import GPUS, Gpus
from tests.full_size import config_only, write_header
from tests.thorough import crossed
from tests.tiny import FAMILIES, make_model, tiny_config

GIB = 1024**3
DEEPSEEK = next(family for family in FAMILIES if family.id == "deepseek_v3")
QWEN = next(family for family in FAMILIES if family.id == "qwen3_moe")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("qwen") / "model", tiny_config(QWEN)))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("deepseek") / "model", tiny_config(DEEPSEEK)))


def fit(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["fit", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return result


def refusal(exit_code: int, *arguments: str) -> str:
    """The one message on stderr with which the command refuses."""
    result = fit(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.count("Error: ") == 1
    return result.stderr


def answer(*arguments: str) -> dict[str, Any]:
    result = fit(*arguments, "--json")
    assert result.exit_code in (0, 3), result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert result.exit_code == (3 if found["fits"] is False else 0)
    assert isinstance(found, dict)
    return found


def test_json_has_all_that_was_promised(model: str) -> None:
    found = answer(model, "--budget-gib", "24", "--context", "100")
    kinds = {
        "weights_bytes": int, "kv_cache_bytes": int, "state_bytes": int, "total_bytes": int, "budget_bytes": int,
        "fits": bool, "experts_per_layer": int, "max_experts_per_layer": int, "max_context": int, "terms": list,
        "left_bytes": int, "nearest": list, "table": list, "notes": list,
    }  # fmt: skip
    assert {name: type(found[name]) for name in kinds} == kinds
    assert found["budget_bytes"] == 24 * GIB
    assert found["total_bytes"] == sum(term["bytes"] for term in found["terms"])
    assert found["left_bytes"] == found["budget_bytes"] - found["total_bytes"]
    assert found["weights_bytes"] == sum(
        term["bytes"] for term in found["terms"] if term["name"].startswith("weights: ")
    )
    assert {term["kind"] for term in found["terms"]} == {"exact", "modelled"}
    assert found["kv_cache_bytes"] == 4 * 2 * 2 * 16 * 4 * 100
    assert (found["experts_per_layer"], found["max_experts_per_layer"], found["max_context"]) == (8, 8, 256)
    assert found["max_experts_in_all_layers"] == 32
    assert found["nearest"] == []
    assert all(cell["fits"] for cell in found["table"])


def test_json_when_it_does_not_fit(model: str) -> None:
    found = answer(model, "--budget-gib", "0.4", "--batch", "3", "--kv-dtype", "fp8", "--keep", "4")
    assert not found["fits"]
    assert (found["experts_per_layer"], found["max_experts_per_layer"]) == (4, 0)
    assert found["context"] == 256, "no more than the model can have"
    assert found["kv_cache_bytes"] == 3 * 4 * 2 * 2 * 16 * 256
    assert (found["batch"], found["kv_dtype"], found["weights"]) == (3, "fp8", "source")
    assert found["max_context"] == 0
    assert found["nearest"][-1]["settings"].startswith("--budget-gib ")


def test_text_that_fits(model: str) -> None:
    result = fit(model, "--budget-gib", "24", "--context", "100")
    assert result.exit_code == 0
    for words in (
        ", 8 experts per layer; weights source, 100 tokens", "KV cache", "exact", "modelled", "CUDA context",
        "It fits 24.00 GiB (--budget-gib 24), with", "All 8 experts per layer fit.",
        "Longest context that fits: 256 tokens (the model's limit).", "* fits the budget:",
    ):  # fmt: skip
        assert words in result.stdout, words
    assert "Nearest" not in result.stdout


def test_text_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(config_only("qwen3-30b-a3b", tmp_path / "model"))
    # The same model three times, whose tracing takes seconds.
    monkeypatch.setattr("streamprune.planning.forms.read_model", cache(read_model))
    order, build = list[str](), structure.footprint_of_model

    def built(*arguments: Any) -> Any:
        order.append("built")
        return build(*arguments)

    monkeypatch.setattr(structure, "footprint_of_model", built)
    monkeypatch.setattr("streamprune.cli.options.say_loading", lambda *_: order.append("said"))
    result = fit(folder, "--gpu", "rtx-3090")
    assert order[:2] == ["said", "built"], "libraries are imported for seconds"
    assert result.exit_code == 3
    assert "It does not fit 23.56 GiB (--gpu rtx-3090" in result.stdout
    assert "of 128 in every layer; " in result.stdout
    assert "of 6,144 in total over all 48 layers" in result.stdout
    options = result.stdout.partition("Nearest settings that fit:\n")[2].splitlines()
    keep = next(line.split() for line in options if line.startswith("  --keep "))[1]
    assert fit(folder, "--gpu", "rtx-3090", "--keep", keep).exit_code == 0
    assert fit(folder, "--gpu", "rtx-3090", "--keep", str(int(keep) + 1)).exit_code == 3
    assert any(line.startswith("  --weights w4a16") for line in options)
    assert "estimated from config.json" in result.stdout


def test_tight_and_the_limit_are_said(model: str) -> None:
    total = answer(model, "--budget-gib", "24")["total_bytes"]
    result = fit(model, "--budget-gib", repr(total / GIB + 1e-6))
    assert result.exit_code == 0
    assert "Tight: in the worst case" in result.stdout
    assert "weights source, 256 tokens (the model's limit), cache auto" in result.stdout


def test_more_context_than_the_model_can_have_is_refused(model: str, tmp_path: Path) -> None:
    expected = "--context 257: by its config.json the model can have 256 tokens"
    assert expected in refusal(2, model, "--budget-gib", "24", "--context", "257")
    for command in (["run", model, "-o", str(tmp_path / "out"), "--keep", "4", "--dry-run"],):
        result = CliRunner().invoke(main, [*command, "--context", "257"])
        assert (result.exit_code, expected in result.stderr) == (2, True)
        planned = CliRunner().invoke(main, [*command, "--json"])
        assert json.loads(planned.stdout)["memory"]["context"] == 256


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": "much", "original_max_position_embeddings": 256}, 256),
        ({"full_attention": {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 256}}, 640),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256}, 256),
        ("none", 256),
    ],
)
def test_the_longest_context_counts_what_yarn_extends(rope: Any, longest: int) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        assert max_positions({"max_position_embeddings": 256, name: rope}) == longest
    assert max_positions({"rope_scaling": rope}) is None


def test_without_a_budget_all_known_gpus_are_listed(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streamprune.fit.answer.list_gpus", lambda **_: Gpus((), ("no driver",)))
    found = answer(model)
    assert (found["budget_bytes"], found["fits"], found["left_bytes"], found["nearest"]) == (None,) * 4
    assert [card["gpu"] for card in found["cards"]] == [
        gpu.key for gpu in sorted(GPUS, key=lambda gpu: gpu.usable_bytes)
    ]
    assert all(card["fits"] and card["max_experts"]["source"] == 8 for card in found["cards"])
    assert all(card["max_context"] == 256 for card in found["cards"])
    assert all(cell["fits"] is None for cell in found["table"])
    text = fit(model).stdout
    assert "No budget was given. Of the GPUs known by name it fits: rtx-5060-ti-8gb, " in text
    _, found_table, rest = text.partition("Totals in MiB by experts removed:\n")
    assert found_table, "in GiB all totals of this model would look alike"
    totals = [line.split()[2] for line in rest.splitlines()[1:]]
    assert len(set(totals)) == len(totals) > 1
    # 24 GB cards keep as many as the answer for one of them says.
    folder = str(config_only("qwen3-30b-a3b", tmp_path / "model"))
    monkeypatch.setattr("streamprune.planning.forms.read_model", cache(read_model))
    rows = fit(folder).stdout.splitlines()
    assert "Totals in GiB by experts removed:" in rows
    row = next(row.split() for row in rows if row.endswith("rtx-3090"))
    told = answer(folder, "--gpu", "rtx-3090")
    assert row[5] == str(told["max_experts_per_layer"])
    assert row[6] == str(answer(folder, "--gpu", "rtx-3090", "--weights", "fp8")["max_experts_per_layer"])
    # What is removed then, in words, with the source, and what would lose less.
    share = 1 - told["max_experts_per_layer"] / 128
    assert told["verdict"][0].startswith(
        f"{share:.0%} of the experts' weights are removed: beyond 65 % expect breakage"
    )
    assert "arXiv:2510.13999" in told["verdict"][0]
    assert f"with --weights fp8 {row[6]} of 128 experts fit" in told["verdict"][1]
    assert "--by channels --refit" in told["verdict"][1]


def test_verdicts_go_by_the_share_of_the_experts_weights(model: str) -> None:
    assert verdict(0) is None
    assert "usually lose little" in (verdict(0.25) or "")
    assert "noticeable" in (verdict(0.5) or "")
    assert "expect breakage" in (verdict(0.66) or "")
    assert answer(model, "--budget-gib", "24")["verdict"] == []
    assert answer(model, "--budget-gib", "24", "--keep", "6")["verdict"][0].startswith("25% of the experts'")
    assert answer(model, "--budget-gib", "24", "--keep", "4", "--width", "16")["verdict"][0].startswith("75% of the")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-gib", "nan"], "--budget-gib nan must be above 0"),
        (["--budget-gib", "0"], "--budget-gib 0 must be above 0"),
        (["--budget-gib", "-3"], "--budget-gib -3 must be above 0"),
        (["--budget-gib", "inf"], "--budget-gib inf must be above 0 and below 1048576 (GiB)"),
        (["--budget-gib", "24", "--gpu", "rtx-3090"], "either --budget-gib or --gpu, not both"),
        (["--gpu", "voodoo"], "'voodoo' is unknown. Known GPUs: "),
        (["--gpu", ""], "'' is unknown"),
        (["--budget-gib", "24", "--keep", "9"], "--keep 9 is not possible: choose from 2 to 8"),
        (["--budget-gib", "24", "--keep", "0"], "--keep 0 is not possible"),
        (["--budget-gib", "24", "--keep", "-1"], "--keep -1 is not possible"),
        (["--budget-gib", "24", "--context", "0"], "--context 0 is too small"),
        (["--budget-gib", "24", "--batch", "0"], "--batch 0 is too small"),
        (["--budget-gib", "24", "--context", str(10**30)], "more than any GPU could hold"),
        (["--budget-gib", "24", "--batch", str(10**30)], "more than any GPU could hold"),
        (["--budget-gib", "24", "--revision", "main"], "is a local folder"),
        (["--budget-gib", "24", "--kv-dtype", "fp4"], "'fp4' is not one of"),
        (["--budget-gib", "24", "--weights", "fp4"], "'fp4' is not one of"),
        (["--budget-gib", "much"], "'much' is not a valid float"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(model: str, arguments: list[str], message: str) -> None:
    assert message in refusal(2, model, *arguments)


def test_keep_must_be_a_multiple_of_the_groups(grouped: str) -> None:
    assert "--keep 5 is not possible: choose from 4 to 8 in steps of 2" in refusal(
        2, grouped, "--budget-gib", "24", "--keep", "5"
    )
    assert answer(grouped, "--budget-gib", "24", "--keep", "6")["experts_per_layer"] == 6


def config_in(folder: Path, **values: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    budget = ("--budget-gib", "24")
    assert "No folder './missing' here" in refusal(1, "./missing", *budget)
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal(1, str(tmp_path / "empty"), *budget)
    broken = tmp_path / "broken"
    broken.mkdir()
    for text in ("{", "[]", "\xff", "[" * 100_000, '{"hidden_size": ' + "1" * 5000 + "}"):
        (broken / "config.json").write_text(text, encoding="latin-1")
        assert "config.json" in refusal(1, str(broken), *budget)
    unknown = config_in(tmp_path / "unknown", model_type="never_heard_of", hidden_size=64)
    assert "does not know the model" in refusal(1, unknown, *budget)
    nothing = config_in(tmp_path / "nothing")
    assert "nothing" in refusal(1, nothing, *budget)
    pickled = Path(config_in(tmp_path / "pickled", **tiny_config(QWEN).to_dict() | {"dtype": "float32"}))
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickled weights only (pytorch_model.bin)" in refusal(1, str(pickled), *budget)
    encoder = config_in(tmp_path / "encoder", model_type="t5")
    assert "encoder-decoder" in refusal(1, encoder, *budget)
    no_cache = config_in(tmp_path / "no-cache", model_type="bert")
    assert "BertLMHeadModel returns no cache of keys and values" in refusal(1, no_cache, *budget)


ABSURD = [
    {"num_hidden_layers": -4},
    {"num_hidden_layers": "four"},
    {"num_hidden_layers": [4, 4]},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**30},
    {"num_experts": 10**12},
    {"num_experts": -8},
    {"num_experts": [8, {}]},
    {"num_experts": 8.5},
    {"num_experts_per_tok": 0},
    {"num_experts_per_tok": 100},
    {"num_experts_per_tok": [2] * 100_000},
    {"hidden_size": 10**30},
    {"hidden_size": 0},
    {"hidden_size": None},
    {"num_attention_heads": 10**9},
    {"num_key_value_heads": 0},
    {"head_dim": -16},
    {"vocab_size": 10**15},
    {"vocab_size": {"of": "words"}},
    {"max_position_embeddings": 10**30},
    {"max_position_embeddings": -1},
    {"moe_intermediate_size": "wide"},
    {"n_group": 3},
    {"dtype": "float13"},
    {"dtype": 16},
    {"text_config": [1, 2]},
    {"text_config": {"text_config": {"num_experts": 8}}},
    {"model_type": 7},
    {"model_type": ["qwen3_moe"]},
    {"rope_parameters": "none"},
    {"layer_types": ["full_attention"] * 100_000},
    {"architectures": 3},
    {"quantization_config": "yes"},
]


@pytest.mark.parametrize(
    ("absurd", "kind"),
    # With the weights beside it, only some: the same is read of the config.
    crossed(ABSURD, ["config", "weights"], usual=[*product(ABSURD, ["config"]), *product(ABSURD[::3], ["weights"])]),
    ids=lambda value: str(value)[:60],
)
def test_absurd_configs_get_an_answer_or_a_message(
    absurd: dict[str, Any], kind: str, model: str, tmp_path: Path
) -> None:
    config = json.loads((Path(model) / "config.json").read_text())
    folder = Path(config_in(tmp_path / "model", **{**config, **absurd}))
    if kind == "weights":
        for path in Path(model).glob("*.safetensors*"):
            (folder / path.name).symlink_to(path)
    result = fit(str(folder), "--budget-gib", "24")
    assert result.exit_code in (0, 1, 2, 3), result.output
    assert ("Error: " in result.stderr) == (result.exit_code in (1, 2))
    assert len(result.stderr) < 2000


def test_config_alone_of_an_unread_format_is_said(grouped: str, tmp_path: Path) -> None:
    config = json.loads((Path(grouped) / "config.json").read_text())
    quantization = {"quant_method": "hqq", "quant_config": {}}
    folder = config_in(tmp_path / "model", **config, quantization_config=quantization)
    found, plain = answer(folder, "--budget-gib", "24"), answer(grouped, "--budget-gib", "24")
    assert found["weights_bytes"] == plain["weights_bytes"]
    assert any("published weights are quantized (hqq)" in note for note in found["notes"])


def test_deeply_nested_config(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"num_experts": 8}
    for _ in range(900):
        inner = {"text_config": inner}
    assert "nested" in refusal(1, config_in(tmp_path / "model", model_type="qwen3_moe", **inner), "--budget-gib", "24")


def test_damaged_weights(model: str, tmp_path: Path) -> None:
    folder = Path(config_in(tmp_path / "model", **json.loads((Path(model) / "config.json").read_text())))
    write_header(folder / "model.safetensors", {"model.embed_tokens.weight": ("F32", (256, 64))})
    assert "has experts in 0 layers, but by its config there should be some in 4" in refusal(
        1, str(folder), "--budget-gib", "24"
    )
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    assert "model.safetensors is damaged" in refusal(1, str(folder), "--budget-gib", "24")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    assert "outside the model folder" in refusal(1, str(folder), "--budget-gib", "24")


#: Prints how each command ends where importing torch or transformers fails.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from streamprune.cli import main

ended = []
for words in json.loads(sys.argv[1]):
    try:
        ended.append(main(words, "streamprune", standalone_mode=True))
    except SystemExit as end:
        ended.append(end.code)
print(ended)
"""


def test_help_and_refusals_need_no_torch(model: str) -> None:
    missing, below = ["fit", "./missing", "--budget-gib", "1"], ["fit", model, "--budget-gib", "-1"]
    commands = [["--help"], ["fit", "--help"], ["--version"], missing, below]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True, timeout=60,
        check=False, cwd=Path(__file__).parents[1], env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 1, 2]", done.stderr


def test_the_share_removed_says_how_many_stay(model: str, grouped: str) -> None:
    assert answer(model, "--budget-gib", "24", "--ratio", "0.5")["experts_per_layer"] == 4
    assert answer(grouped, "--budget-gib", "24", "--ratio", "0.3")["experts_per_layer"] == 6, "groups stay equal"
    assert "--ratio 50 is not between 0 and 1. It is the share to remove; 0.5 is half. For 50 % write --ratio 0.5." in (
        refusal(2, model, "--budget-gib", "24", "--ratio", "50")
    )
    assert "either --keep or --ratio" in refusal(2, model, "--budget-gib", "24", "--ratio", "0.5", "--keep", "4")


@pytest.mark.parametrize(
    ("command", "option", "hint"),
    [
        ("run", "--compression-ratio", "Here it is --ratio R, the share of experts to remove"),
        ("fit", "--compression_ratio", "Here it is --ratio R"),
        ("prune", "--sparsity", "Here it is --ratio R"),
        ("run", "--num-experts", "Here it is --keep N"),
        ("score", "--dataset", "Here it is --calibration TEXT"),
        ("eval", "--dataset", "Here it is --data TEXT"),
        ("fit", "--quantization", "--gguf TYPE to plan for what llama.cpp makes of it"),
        ("fit", "--model", "MODEL stands without an option"),
        ("status", "--compression-ratio", "No such option"),
    ],
)
def test_options_as_other_tools_name_them(command: str, option: str, hint: str) -> None:
    result = CliRunner().invoke(main, [command, "m", option, "0.5"])
    assert result.exit_code == 2
    assert hint in result.stderr
    assert ("Here it is" in result.stderr) == (command != "status")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("run m -o out --keep 3 --calibration a b", "(b). --calibration takes one value. For several write it again"),
        ("eval m --data a b c", "--data takes one value. For several write it again: --data A --data B."),
        ("eval m --tasks a b", "Write several values with commas: --tasks NAME,…."),
        ("status a b", "Got unexpected extra argument (b)\n"),
        ("run m -o out --budget-gib 24GB", "It is a number of GiB: write --budget-gib 24."),
        ("fit m --budget-gib 23.5 GiB", "It is a number of GiB: write --budget-gib 23.5."),
        ("run m -o out --keep 3 --ram-gib plenty", "It is a number of GiB: write --ram-gib 24."),
        ("fit m --context 32k", "Write the whole number: --context 32768."),
        ("run m -o out --ratio 50%", "It is a share: write --ratio 0.5."),
        ("run m -o out --keep many", "'many' is not a valid integer.\n"),
    ],
)
def test_values_as_people_write_them(words: str, hint: str) -> None:
    split = words.replace("23.5 GiB", "23.5_GiB").split()
    result = CliRunner().invoke(main, [word.replace("_", " ") for word in split])
    assert result.exit_code == 2
    assert hint in result.stderr
