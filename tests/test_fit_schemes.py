"""Weights that `fit --weights` predicts, against the bytes that `prune` and `run` write, and counts made by hand."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import DoesNotFitError, SettingsError, UnsupportedModelError
from streamprune.fit.answer import fit_object, resolve_budget, table
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.nearest import most_experts, nearest, other_formats
from streamprune.pipeline.prune import dry_run, prune
from streamprune.pipeline.run import run
from streamprune.planning.forms import read_forms
from streamprune.quantize.schemes import SCHEMES
from streamprune.targets import ServingSpec, Storage
from tests.full_size import config_only, published
from tests.helpers import known_family
from tests.quantized import make_quantized
from tests.thorough import crossed, mostly_thorough
from tests.tiny import make_model, tiny_config, write_token_ids

GIB = 1024**3
#: All experts can be stored by every scheme, and their scales change in number and group when they become narrower.
SIZES = {"hidden_size": 128, "moe_intermediate_size": 256, "intermediate_size": 256}
NARROW = 64
FAMILIES = {
    "qwen3_moe": {}, "deepseek_v3": {}, "glm4_moe": {}, "qwen2_moe": {"shared_expert_intermediate_size": 256},
    "mixtral": {}, "ernie4_5_moe": {}, "qwen3_5_moe_text": {"shared_expert_intermediate_size": 256},
}  # fmt: skip
#: The fourth layer is the first with full attention.
LAYERS = {"qwen3_5_moe_text": 4}


def read(model: Path, quantize: str = "all-linear", width: int | None = None) -> Footprint:
    return read_forms(str(model), None, False, Storage("w4a16", quantize), width)


def sized(name: str) -> Any:
    kind, layers = known_family(name), {"num_hidden_layers": LAYERS.get(name, 2)}
    config = tiny_config(replace(kind, sizes={**kind.sizes, **SIZES, **FAMILIES.get(name, {}), **layers}))
    if name == "ernie4_5_moe":
        config.tie_word_embeddings = True
    return config


class Sources(dict[str, Path]):
    """By family, made when asked for: a folder with a tiny `model`, its `config` alone, and `scores.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> Path:
        folder = self._folder / name
        model = make_model(folder / "model", sized(name), max_shard_size="1GB")
        (folder / "config").mkdir()
        shutil.copy(model / "config.json", folder / "config")
        ids = str(write_token_ids(folder / "ids.jsonl"))
        scores = folder / "scores.safetensors"
        run(RunSettings(model=str(model), output=scores, only_score=True, calibration=(ids,)), quiet=True)
        self[name] = folder
        return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def predicted(footprint: Footprint, weights: str, keep: int | None, width: int | None) -> int:
    return Estimate(footprint, ServingSpec(weights=weights, keep=keep, width=width)).weights_bytes


@pytest.mark.parametrize(
    ("name", "weights"),
    crossed(
        FAMILIES, SCHEMES,
        usual=[*product(["deepseek_v3", "qwen3_5_moe_text"], ["fp8", "w4a16"]), ("qwen3_moe", "fp8-dynamic"),
               ("mixtral", "w4a16"), ("ernie4_5_moe", "w8a16"), ("qwen2_moe", "fp8"), ("glm4_moe", "w4a16")],
    ),
)  # fmt: skip
def test_predicted_bytes_are_the_written_ones(name: str, weights: str, sources: Sources, tmp_path: Path) -> None:
    folder, keep = sources[name], known_family(name).keep
    seen, ways = set(), ("experts", "all-linear")
    footprints = {(way, source): read(folder / source, way) for way in ways for source in ("model", "config")}
    for quantize, kept, width in [
        ("experts", keep, None), ("experts", keep, NARROW), ("all-linear", keep, None), ("all-linear", 8, NARROW),
        ("all-linear", None, None),
    ]:  # fmt: skip
        output = tmp_path / f"{quantize}-{kept}-{width}"
        settings: dict[str, Any] = {"keep": kept, "width": width, "weights": weights, "quantize": quantize}
        if kept is not None:
            settings["scores"] = folder / "scores.safetensors"
        made = PruneSettings(model=str(folder / "model"), output=output, rounding="rtn", verify=False, **settings)
        planned = dry_run(made, quiet=True)["memory"] if kept == 8 else None
        prune(made, quiet=True)
        written = open_checkpoint(output).nbytes
        for source in ("model", "config"):
            found = predicted(footprints[quantize, source], weights, kept, width)
            assert found == written, (quantize, kept, width, source)
        assert planned is None or planned["weights_bytes"] == written
        seen.add(written)
    assert len(seen) == 5


def test_a_run_says_what_fit_says(sources: Sources, tmp_path: Path) -> None:
    """By a budget: as many experts as `fit` says stay, in files as large as it says."""
    folder = sources["qwen3_moe"]
    unpruned = Fit(read(folder / "model"), ServingSpec(context=64, weights="fp8"), 0)
    budget = (unpruned.changed(keep=5).total + 10) / GIB
    options = ["--budget-gib", repr(budget), "--context", "64", "--weights", "fp8", "--json"]
    told = json.loads(CliRunner().invoke(main, ["fit", str(folder / "model"), *options]).stdout)
    assert told["max_experts_per_layer"] == 5
    command = ["run", str(folder / "model"), "-o", str(tmp_path / "out"), "--calibration", str(folder / "ids.jsonl")]
    dry = CliRunner().invoke(main, [*command, *options, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 0, done.output
    memory, written = json.loads(done.stdout)["memory"], open_checkpoint(tmp_path / "out").nbytes
    assert json.loads(dry.stdout)["memory"] == memory
    assert memory["weights_bytes"] == written == unpruned.changed(keep=5).weights_bytes
    # Asked about as it is, the output takes the same.
    again = Fit(read(tmp_path / "out"), ServingSpec(context=64), 0)
    assert (again.weights_bytes, again.total) == (written, memory["total_bytes"])


def hand_count(config: dict[str, Any], keep: int, matrix: Any, rest: Any) -> int:
    """Bytes of Qwen3-30B-A3B: `matrix` gives those of a quantized matrix by rows and columns, `rest` of values."""
    hidden, layers, experts, width = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size")
    )
    heads, groups, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    assert (hidden, layers, experts, width, heads, groups, size) == (2048, 48, 128, 768, 32, 4, 128)
    each = 2 * matrix(width, hidden) + matrix(hidden, width)
    attention = matrix(heads * size, hidden) + 2 * matrix(groups * size, hidden) + matrix(hidden, heads * size)
    plain = keep * hidden + 2 * hidden + 2 * size
    return layers * (keep * each + attention + rest(plain)) + rest(2 * config["vocab_size"] * hidden + hidden)


#: Bytes of a matrix: codes, and scales; for pack-quantized two whole numbers of 8 bytes that are its shape.
BY_HAND = {
    "fp8": lambda rows, columns: rows * columns + math.ceil(rows / 128) * math.ceil(columns / 128) * 4,
    "fp8-dynamic": lambda rows, columns: rows * columns + rows * 2,
    "w8a16": lambda rows, columns: rows * columns + rows * columns // 128 * 2 + 16,
    "w4a16": lambda rows, columns: rows * columns // 2 + rows * columns // 128 * 2 + 16,
}


@pytest.mark.parametrize("source", mostly_thorough(["config", "files"], ["files"]))
def test_qwen3_30b_by_hand(source: str, tmp_path: Path) -> None:
    make = {"config": config_only, "files": published}[source]
    footprint = read(make("qwen3-30b-a3b", tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for (weights, matrix), keep in product(BY_HAND.items(), (128, 83)):
        by_hand = hand_count(config, keep, matrix, lambda values: values * 2)
        assert predicted(footprint, weights, keep, None) == by_hand, (weights, keep)
    estimate = Estimate(footprint, ServingSpec(weights="fp8"))
    kinds = {term.kind for term in estimate.terms if term.name.startswith("weights")}
    assert kinds == {"exact" if source == "files" else "modelled"}


def test_deepseek_v2_lite_by_hand(tmp_path: Path) -> None:
    """Experts alone: those of 1,408 channels, a multiple of 128; the others stay in 16 bits."""
    footprint = read(published("deepseek-v2-lite", tmp_path), "experts")
    plain, experts, values = 31_412_968_448, 26 * 64, 1408 * 2048
    blocks = (1408 // 128) * (2048 // 128)
    expected = plain - experts * 3 * values * 2 + experts * 3 * (values + 4 * blocks)
    assert predicted(footprint, "fp8", None, None) == expected


def test_deepseek_r1_is_already_in_fp8(tmp_path: Path) -> None:
    """Of a config alone whose weights are quantized: w4a16 is counted from what they decode to."""
    footprint = read(config_only("deepseek-r1", tmp_path), "experts")
    config = json.loads((tmp_path / "config.json").read_text())
    hidden, width, experts = (config[name] for name in ("hidden_size", "moe_intermediate_size", "n_routed_experts"))
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    values = layers * experts * 3 * hidden * width
    by_hand = values // 2 + values // 128 * 2 + layers * experts * 3 * 16
    assert footprint.sizes("w4a16").bytes_by_category(experts)["experts"] == by_hand
    with pytest.raises(SettingsError, match=r"stored as FP8 \(blocks of 128 x 128\) already: --weights fp8"):
        footprint.sizes("fp8")


def test_groups_follow_tensor_parallelism(sources: Sources) -> None:
    model = sources["qwen3_moe"] / "model"
    sizes = [
        predicted(read_forms(str(model), None, False, Storage("w4a16", tensor_parallel=ranks)), "w4a16", None, None)
        for ranks in (1, 4)
    ]
    # 256 channels on four ranks have groups of 64 instead of 128: twice as many scales.
    assert sizes[0] < sizes[1]
    with pytest.raises(SettingsError, match=r"256 columns over 16 ranks.*tensor-parallel 1 or 2 or 4 or 8"):
        read_forms(str(model), None, False, Storage("w4a16", tensor_parallel=16)).sizes("w4a16")


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx"])
def test_experts_in_one_tensor_say_why(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(known_family(name)))
    result = CliRunner().invoke(main, ["fit", str(model), "--budget-gib", "24", "--weights", "fp8"])
    assert result.exit_code == UnsupportedModelError.exit_code
    assert f"experts of this {name} model cannot be quantized" in result.stderr
    told = json.loads(CliRunner().invoke(main, ["fit", str(model), "--budget-gib", "24", "--json"]).stdout)
    assert {cell["weights"] for cell in told["table"]} == {"source"}
    assert [note for note in told["notes"] if note.startswith("The table leaves out --weights fp8 and w4a16. The expe")]


def test_options_that_only_schemes_have(sources: Sources) -> None:
    command = ["fit", str(sources["qwen3_moe"] / "model"), "--budget-gib", "24"]
    for options, message in [
        (["--quantize", "experts"], "--quantize is for weights that are quantized anew"),
        (["--weights", "fp8", "--tensor-parallel", "0"], "--tensor-parallel 0 is too small"),
        (["--weights", "bf16"], "are plain already"),
        (["--weights-dtype", "fp8"], "No such option"),
        (["--width", "256"], "--width 256: each expert has 256 channels"),
    ]:
        result = CliRunner().invoke(main, [*command, *options])
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert "--weights-dtype" in CliRunner().invoke(main, ["fit", "--help"]).stdout


def test_a_quantized_source_keeps_its_width(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, "fp8", sizes=SIZES)
    result = CliRunner().invoke(main, ["fit", str(made.source), "--budget-gib", "24", "--width", "64"])
    assert result.exit_code == UnsupportedModelError.exit_code
    assert "its experts cannot be made narrower" in result.stderr


def test_most_experts_by_format(sources: Sources, tmp_path: Path) -> None:
    """What fits in each format, in the sentence of a plan, and as commands that exist in a refusal."""
    folder = sources["qwen3_moe"]
    footprint = read(folder / "model")
    plain = Fit(footprint, ServingSpec(context=64), 0)
    budget = plain.changed(keep=3).total
    fit = replace(plain, budget=budget)
    by_format = {weights: most_experts(fit, weights) for weights in ("source", *SCHEMES)}
    for weights, most in by_format.items():
        fits = [keep for keep in range(2, 9) if fit.changed(weights=weights, keep=keep).fits]
        assert most == max(fits), weights
    assert by_format["source"] == 3
    told = other_formats(replace(fit, use=replace(fit.use, keep=3)))
    most = by_format["fp8"]
    assert told is not None
    assert told.split(", ")[0] == f"with --weights fp8 {'all 8' if most == 8 else f'{most} of 8'} experts fit"
    assert other_formats(fit.changed(weights="fp8")) is None
    assert other_formats(replace(fit, budget=plain.total)) is None
    command = ["run", str(folder / "model"), "-o", str(tmp_path / "out"), "--context", "64", "--budget-gib"]
    result = CliRunner().invoke(main, [*command, repr(budget / GIB), "--dry-run"])
    printed = result.stdout + result.stderr
    assert f"What may lose less in the same memory: {told}; narrower experts with a refit" in printed
    assert "note: 62% of the experts' weights are removed: around 50 % the loss is noticeable" in printed
    result = CliRunner().invoke(main, [*command, repr(plain.changed(keep=2).total / GIB - 1e-6), "--dry-run"])
    assert result.exit_code == DoesNotFitError.exit_code
    assert "--weights fp8" in result.stderr


def test_nearest_settings_with_a_scheme_fit(sources: Sources) -> None:
    """Every option that is named is a command whose answer is yes."""
    model = str(sources["qwen3_moe"] / "model")
    whole = Fit(read(Path(model)), ServingSpec(context=64), 0)
    seen = set()
    for budget in (whole.changed(keep=2).total - 1, whole.changed(weights="fp8", keep=4).total, whole.total - 1):
        for option in nearest(replace(whole, budget=budget)):
            held = [] if "--budget-gib" in option.settings else ["--budget-gib", repr(budget / GIB)]
            answer = CliRunner().invoke(main, ["fit", model, "--context", "64", *held, *option.settings.split()])
            assert answer.exit_code == 0, (option, answer.output)
            seen |= {word for word in option.settings.split() if word.startswith("--") or word in SCHEMES}
    assert seen >= {"--weights", "fp8", "--keep", "--budget-gib"}


def test_the_table_has_the_asked_format(sources: Sources) -> None:
    footprint, budget = read(sources["qwen3_moe"] / "model"), resolve_budget(24, None)
    fit = Fit(footprint, ServingSpec(context=64, weights="w8a16", keep=4), budget.nbytes)
    assert list(dict.fromkeys(cell.weights for cell in table(fit))) == ["source", "fp8", "w4a16", "w8a16"]
    for cell in table(fit):
        assert cell.total_bytes == fit.changed(keep=cell.experts, weights=cell.weights, context=cell.context).total
    told = fit_object(fit, budget)
    assert told["weights"] == "w8a16"
    # What transformers makes of it: the plain weights.
    assert told["decoded_weights_bytes"] == fit.changed(weights="source").weights_bytes
    assert any("transformers decodes these weights" in note for note in told["notes"])
