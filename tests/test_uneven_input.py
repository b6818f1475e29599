"""Models whose blocks keep different numbers of experts, given as MODEL: `fit` tells their memory, the rest refuses."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.fit.answer import fit_object, terms_lines
from streamprune.fit.estimate import Fit, Footprint, check_keep, per_layer_note
from streamprune.fit.footprint import read_footprint
from streamprune.fit.nearest import nearest
from streamprune.hardware.memory import format_bytes
from streamprune.models.per_layer_experts import read_per_layer_experts
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import run
from streamprune.targets import ServingSpec
from tests.fuzzing import Tally, judge, mutated_json
from tests.helpers import known_family, tree_bytes
from tests.hub_model import hub_for_this_process
from tests.tiny import FAMILIES, Family, make_model, tiny_config, write_token_ids
from tests.uneven import Uneven, make_uneven

GIB = 1024**3
#: One layout each: an expert per tensor, groups and dense layers, packed experts, a part of the config, a table of our
#: own, images, hybrids.
KINDS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "gemma4_text", "qwen3_5_moe", "granitemoehybrid")
#: What the tests below do with the command line, less the name of the model.
REFUSED = {
    "run": ["-o", "new", "--keep", "3"],
    "run a dry run": ["-o", "new", "--budget-gib", "0.6", "--dry-run"],
    "score": ["-o", "new.safetensors"],
    "prune by a list": ["-o", "new", "--keep-file", "list.json"],
    "prune": ["-o", "new", "--scores", "out", "--keep", "3"],
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in arguments])


def refusal(status: int, *arguments: object) -> str:
    """The one message of a command that is refused."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def pruned(folder: Path, family: str = "qwen3_moe", **goal: Any) -> tuple[Path, Any]:
    """An uneven output in `folder/out` of the model in `folder/model`, and what pruning told."""
    source = make_model(folder / "model", tiny_config(known_family(family)))
    ids = str(write_token_ids(folder / "ids.jsonl"))
    scores = folder / "scores.safetensors"
    run(RunSettings(model=str(source), output=scores, only_score=True, calibration=(ids,)), quiet=True)
    goal = {"keep": 4, "schedule": "linear-decrease", "spread": 0.25, "context": 128} | goal
    result = prune(PruneSettings(model=str(source), output=folder / "out", scores=scores, **goal), quiet=True)
    return folder / "out", result


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source model, its scores, and an uneven output of it."""
    folder = tmp_path_factory.mktemp("qwen")
    pruned(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    return make_uneven(known_family(request.param), tmp_path_factory.mktemp("made"))


def total(footprint: Footprint) -> int:
    return sum(footprint.weights.sizes().bytes_by_category(0).values())


@pytest.mark.parametrize("trusted", [False, True])
def test_weights_and_cache_are_exact(made: Uneven, trusted: bool) -> None:
    footprint = read_footprint(str(made.output), trust_remote_code=trusted)
    assert footprint.weights.counts == made.counts
    assert footprint.weights.count == max(made.counts.values())
    assert footprint.weights.measured
    assert total(footprint) == footprint.weights.nbytes == open_checkpoint(made.output).nbytes
    source = read_footprint(str(made.source))
    assert footprint.cache == source.cache
    assert (footprint.itemsize, footprint.max_positions) == (source.itemsize, source.max_positions)
    # What of the source's weights is no expert's stays, and of the experts what was kept.
    sizes = source.weights.sizes(with_mtp=False)
    share = sum(made.counts.values()) / sizes.expert_layers
    assert total(footprint) == pytest.approx(sum(sizes.bytes_by_category(share).values()), abs=1)
    with pytest.raises(SettingsError, match=r"--weights fp8 is not possible: the layers of .* cannot be pruned again"):
        footprint.sizes("fp8")


def test_a_config_alone_tells_the_same(made: Uneven, tmp_path: Path) -> None:
    shutil.copy(made.output / "config.json", tmp_path)
    alone, files = read_footprint(str(tmp_path)), read_footprint(str(made.output))
    assert (alone.weights.counts, alone.cache, alone.shape) == (files.weights.counts, files.cache, files.shape)
    assert not alone.weights.measured
    assert alone.weights.sizes().bytes_by_category(0) == files.weights.sizes().bytes_by_category(0)


@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        ("qwen3_moe", "global"),
        ("qwen3_moe", "linear-decrease"),
        ("gpt_oss", "global"),
        ("dbrx", "linear-increase"),
        ("gemma4_text", "linear-decrease"),
        ("deepseek_v3", "linear-decrease"),
    ],
)
def test_fit_says_what_prune_said(family: str, schedule: str, tmp_path: Path) -> None:
    output, result = pruned(tmp_path, family, keep=6, schedule=schedule, spread=None)
    memory, counts = result.summary["memory"], [len(layer.kept) for layer in result.layers]
    assert len(set(counts)) > 1
    assert (memory["experts_per_layer"], memory["experts_in_all_layers"]) == (counts, sum(counts))
    told = fit_object_of(output, "--context", "128")
    assert {name: told[name] for name in memory} == memory
    assert told["weights_bytes"] == open_checkpoint(output).nbytes == result.summary["output_bytes"]
    card = (output / "README.md").read_text()
    for term in told["terms"]:
        assert f"| {term['name']} | {format_bytes(term['bytes'])} | {term['kind']} |" in card
    assert f"| experts per layer | 8 | {min(counts)} to {max(counts)} |" in card


def fit_object_of(model: Path, *options: str) -> dict[str, Any]:
    result = invoke("fit", model, "--budget-gib", "80", "--json", *options)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_end_of_a_pruning_and_of_a_run_tells_the_truth(qwen: Path, tmp_path: Path) -> None:
    goal = ["--keep", "4", "--schedule", "linear-decrease", "--spread", "0.25", "--context", "128"]
    by_scores = invoke("prune", qwen / "model", "-o", tmp_path / "a", "--scores", qwen / "scores.safetensors", *goal)
    at_once = invoke("run", qwen / "model", "-o", tmp_path / "b", "--calibration", qwen / "ids.jsonl", *goal)
    for result in (by_scores, at_once):
        assert result.exit_code == 0, result.output
        assert "of 6 experts per layer" not in result.stderr
    # The table stands once in a run, before it is known which block keeps how many; its total is told again at the end.
    assert f"{tmp_path / 'a'}, 2 to 6 experts per layer, 16 in all; weights source" in by_scores.stderr
    assert f"{qwen / 'model'}, 16 of 32 experts in all; weights source" in at_once.stderr
    (total,) = re.findall(r"^ +total +(.+?)  ", by_scores.stderr, re.MULTILINE)
    assert f"by the weights that were written: {total} (" in at_once.stderr
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_text_and_json_say_how_many_experts_the_blocks_keep(qwen: Path) -> None:
    text = invoke("fit", qwen / "out", "--budget-gib", "80").stdout
    assert "out, 2 to 6 experts per layer, 16 in all; weights source" in text
    assert "Most experts that fit" not in text
    assert "All 6 experts" not in text
    assert "keep different numbers of experts already (2 to 6), and it cannot be pruned again" in text
    answer = fit_object_of(qwen / "out")
    assert answer["experts_per_layer"] == answer["source_experts_per_layer"] == [2, 3, 5, 6]
    assert (answer["max_experts_per_layer"], answer["max_experts_in_all_layers"]) == (None, None)
    assert {(cell["ratio"], cell["experts"]) for cell in answer["table"]} == {(0.0, None)}
    assert any("cannot be pruned again" in note for note in answer["notes"])


def test_a_budget_that_it_does_not_fit(qwen: Path) -> None:
    footprint = read_footprint(str(qwen / "out"))
    fit = Fit(footprint, ServingSpec(context=128), Fit(footprint, ServingSpec(context=128), 0).total - 1)
    assert (fit.fits, fit.max_experts, fit.max_total_experts, fit.experts) == (False, None, None, None)
    options = [option.settings for option in nearest(fit)]
    assert options, "a shorter context, for one"
    assert not [option for option in options if "--keep" in option]
    gib = str(fit.budget / GIB)
    result = invoke("fit", qwen / "out", "--budget-gib", gib, "--context", "128")
    assert result.exit_code == 3
    assert "It does not fit" in result.stdout


def test_neither_torch_nor_transformers_is_loaded(qwen: Path) -> None:
    script = (
        "import sys; from streamprune.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "fit", str(qwen / "out"), "--budget-gib", "80"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "2 to 6 experts per layer, 16 in all" in done.stdout


def test_other_numbers_of_experts_are_refused(qwen: Path) -> None:
    message = refusal(2, "fit", qwen / "out", "--keep", "3", "--budget-gib", "80")
    assert "--keep 3 is not possible: the layers of" in message
    assert "`streamprune prune SOURCE --scores ...`" in message
    with pytest.raises(SettingsError, match=re.escape(per_layer_note(read_footprint(str(qwen / "out"))))):
        check_keep(read_footprint(str(qwen / "out")), 3)
    message = refusal(2, "fit", qwen / "out", "--measure", "--budget-gib", "80")
    assert "add --trust-remote-code" in message


@pytest.mark.parametrize("command", REFUSED)
def test_it_is_neither_scored_nor_pruned_again(
    command: str, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(qwen / "out", "out")
    (tmp_path / "list.json").write_text(json.dumps([[0, 1]] * 4))
    before = sorted(tmp_path.rglob("*"))
    message = refusal(1, command.split()[0], "out", *REFUSED[command])
    assert "The layers of out keep different numbers of experts already (2 to 6)" in message
    assert "`streamprune prune SOURCE --scores out -o OUT`" in message
    assert "download" not in message
    assert sorted(tmp_path.rglob("*")) == before
    # The advice is good.
    source = [qwen / "model", "--scores", "out", "-o", "again", "--keep", "3"]
    assert invoke("prune", *source).exit_code == 0


def test_nothing_of_it_is_downloaded(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: data for name, data in tree_bytes(qwen / "out").items() if not name.startswith("scores")}
    (tmp_path / "list.json").write_text(json.dumps([[0, 1]] * 4))
    with hub_for_this_process(tmp_path, monkeypatch) as server:
        server.add("org/uneven", files)
        by_hand = ["--keep-file", tmp_path / "list.json"]
        for command, goal in (("run", ["--keep", "3"]), ("score", []), ("prune", by_hand)):
            message = refusal(1, command, "org/uneven", "-o", tmp_path / "new", *goal)
            assert "The layers of org/uneven keep different numbers of experts already" in message
        assert not [name for name in server.fetched() if name.endswith(".safetensors")]
        assert fit_object_of(Path("org/uneven"))["experts_per_layer"] == [2, 3, 5, 6]


def test_the_other_commands_know_it(qwen: Path, tmp_path: Path) -> None:
    result = invoke("verify", qwen / "out", "--source", qwen / "model")
    assert result.exit_code == 0, result.output
    assert "byte-identical to the source" in result.stdout + result.stderr
    result = invoke("inspect", qwen / "out", "--keep", "4", "--schedule", "linear-decrease", "--spread", "0.25")
    assert result.exit_code == 0, result.output
    assert "4 layers of 8 experts" in result.stdout
    # Nothing is left beside it, and it is not taken for a work folder.
    assert not list(qwen.glob("out.work*"))
    before = tree_bytes(qwen / "out")
    for command in ("status", "clean"):
        assert "a model that streamprune wrote" in refusal(CheckpointError.exit_code, command, qwen / "out")
    assert tree_bytes(qwen / "out") == before


def test_damage_is_found(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen / "out", tmp_path / "out")
    shard = tmp_path / "out" / "model-00005-of-00005.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if ".experts.1." in name)
    del tensors[name]
    save_file(tensors, shard)
    index = tmp_path / "out" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["weight_map"][name]
    index.write_text(json.dumps(told))
    assert "The checkpoint has only 5 of the 6 experts of" in refusal(1, "fit", tmp_path / "out", "--budget-gib", "8")
    message = refusal(1, "verify", tmp_path / "out", "--source", qwen / "model")
    assert name in message


def changed(folder: Path, change: Any) -> str:
    """The output with something else in its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return str(folder)


def table(**entries: Any) -> Any:
    return lambda config: config["per_layer_config"].update(entries)


TWO = {"num_local_experts": 2}
STRANGE = [
    (table(**{"1": {"num_local_experts": 4}}), "The checkpoint has only 3 of the 4 experts"),
    (table(**{"1": TWO}), "The checkpoint has 3 experts of .* but config.json describes 2"),
    (lambda config: config["per_layer_config"].pop("1"), "The checkpoint has only 3 of the 6 experts"),
    (table(**{"4": TWO}), "an entry for '4', which is none of the 4 layers"),
    (table(**{"01": TWO}), "an entry for '01', which is none of the 4 layers, or there twice"),
    (table(**{"-1": TWO}), "an entry for '-1'"),
    (table(**{"9" * 5000: TWO}), "an entry for '9999"),
    (table(**{"٣": TWO}), "an entry for '٣'"),
    (table(**{"0": 3}), "an entry for '0'"),
    (table(**{"0": {}}), "states 0 numbers of experts for layer '0'"),
    (table(**{"0": {"num_local_experts": 0}}), "layer 0: 0 is not a number of experts"),
    (table(**{"0": {"num_local_experts": -3}}), "layer 0: -3 is not a number of experts"),
    (table(**{"0": {"num_local_experts": 10**30}}), "is not a number of experts"),
    (table(**{"0": {"num_local_experts": float("nan")}}), "layer 0: None is not a number of experts"),
    (table(**{"0": {"num_local_experts": True}}), "layer 0: None is not a number of experts"),
    (table(**{"0": {"num_local_experts": [2, 3]}}), "layer 0: None is not a number of experts"),
    (table(**{"0": {"num_local_experts": "2"}}), "layer 0: None is not a number of experts"),
    (table(**{"0": TWO | {"hidden_size": 32}}), "a 'hidden_size' of its own, in addition to its number of experts"),
    (table(**{"0": {"n_routed_experts": 2}}), "None is not a number of experts"),
    (lambda config: config.update(num_local_experts=None), "None is not a number of experts"),
    (lambda config: config.update(per_layer_experts=7), "per_layer_experts is 7, no table of layers"),
]


@pytest.mark.parametrize(("change", "words"), STRANGE)
def test_configs_that_contradict_themselves_or_the_files(change: Any, words: str, qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen / "out", tmp_path / "out")
    assert "num_local_experts" in (tmp_path / "out" / "config.json").read_text()
    model = changed(tmp_path / "out", change)
    assert re.search(words, refusal(1, "fit", model, "--budget-gib", "80"))


def test_a_block_without_experts_gets_none_by_its_config(tmp_path: Path) -> None:
    made = make_uneven(known_family("deepseek_v3"), tmp_path)
    dense = min(set(range(4)) - made.counts.keys())
    entry = {"n_routed_experts": 2}
    model = changed(made.output, lambda config: config["per_layer_config"].update({str(dense): entry}))
    assert f"gives layer {dense} 2 experts, but that layer has none" in refusal(1, "fit", model, "--budget-gib", "80")


def test_tables_about_other_things_are_left_alone() -> None:
    for config in (
        {"num_experts": 8},
        {"num_experts": 8, "per_layer_config": None},
        {"num_experts": 8, "per_layer_config": {"0": {"sliding_window": 4}}},
        {"num_experts": 8, "per_layer_config": {"0": {"num_experts": 8}}, "num_hidden_layers": 2},
    ):
        assert read_per_layer_experts(config) is None
    family = known_family("gemma4_text")
    assert read_per_layer_experts(tiny_config(family).to_dict()) is None


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_even_configs_are_not_uneven(family: Family) -> None:
    assert read_per_layer_experts(json.loads(tiny_config(family).to_json_string())) is None


def test_a_block_may_have_more_than_the_others(qwen: Path, tmp_path: Path) -> None:
    """Ours always have fewer, but the key is transformers' own."""
    shutil.copytree(qwen / "out", tmp_path / "out")

    def turn(config: dict[str, Any]) -> None:
        layers = {str(block): {"num_local_experts": count} for block, count in enumerate((2, 3, 5, 6)) if count != 2}
        config.update(num_local_experts=2, per_layer_config=layers)

    footprint = read_footprint(changed(tmp_path / "out", turn))
    assert footprint.weights.counts == {0: 2, 1: 3, 2: 5, 3: 6}
    assert fit_object(Fit(footprint, ServingSpec(), GIB), budget_of_one()) | {"model": ""} == fit_object(
        Fit(read_footprint(str(qwen / "out")), ServingSpec(), GIB), budget_of_one()
    ) | {"model": "", "notes": notes_of(footprint)}
    assert "2 to 6 experts per layer, 16 in all" in terms_lines(Fit(footprint, ServingSpec(), GIB))[0]


def budget_of_one() -> Any:
    from streamprune.fit.answer import Budget

    return Budget(GIB, "one")


def notes_of(footprint: Footprint) -> Any:
    return fit_object(Fit(footprint, ServingSpec(), GIB), budget_of_one())["notes"]


def test_strange_configs_end_in_one_message(qwen: Path, tmp_path: Path) -> None:
    valid = json.loads((qwen / "out" / "config.json").read_text())
    small = {name: valid[name] for name in ("num_local_experts", "num_hidden_layers", "per_layer_config", "auto_map")}
    inner = {"ffn_config": {"moe_num_experts": 4, "top_k": 2}, "n_layers": 2}
    inner["per_layer_config"] = {"0": {"ffn_config": {"moe_num_experts": 3, "top_k": 2}}}
    assert read_per_layer_experts(small) is not None
    assert read_per_layer_experts(inner) is not None
    assert read_per_layer_experts({"text_config": copy.deepcopy(small)}) is not None
    tally = Tally()

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(mutated_json(small) | mutated_json(inner) | mutated_json({"text_config": small}))
    def read(config: Any) -> None:
        judge(tally, "config.json", lambda: read_per_layer_experts(config) if isinstance(config, dict) else None)

    read()
    assert tally.inputs >= 360
    assert tally.refused > 20


def test_the_whole_command_bears_strange_configs(qwen: Path, tmp_path: Path) -> None:
    valid = json.loads((qwen / "out" / "config.json").read_text())
    shutil.copytree(qwen / "out", tmp_path / "out")
    tally = Tally()

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(mutated_json(valid["per_layer_config"], changes=2))
    def fit(entries: Any) -> None:
        (tmp_path / "out" / "config.json").write_bytes(json.dumps(valid | {"per_layer_config": entries}).encode())
        judge(tally, "", lambda: read_footprint(str(tmp_path / "out")))

    fit()
    assert tally.refused > 10


def test_refusals_are_of_the_right_kind(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="can be neither scored nor pruned again"):
        run(RunSettings(model=str(qwen / "out"), output=tmp_path / "new", keep=3), quiet=True)
