"""The demo: its data, the model that comes with the package, and the two findings that it is there to show."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import training
from measuring.training import trained_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune.calibration import builtin_text as corpus
from streamprune.config import RunSettings
from streamprune.demo.demo import CODE, MIX, SHIPPED, VARIANTS, DemoResult, load_model, shipped_model, write_recipe
from streamprune.errors import OutputError, SettingsError
from streamprune.evaluation.held_out import held_out_recipe
from streamprune.pipeline.run import run
from streamprune.reporting.evaluations import TEXT_NAME, read_result, results_folder
from tests.conftest import DemoRun
from tests.helpers import load_whole
from tests.programs import program
from tests.test_evaluate import measured

#: The tokenizer, and the sequences by domain.
Prepared = tuple[Any, dict[str, training.DomainData]]

# The demo is run once: all of its tests belong to one worker.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def folder(demo_run: DemoRun) -> Path:
    return demo_run.folder


@pytest.fixture(scope="module")
def result(demo_run: DemoRun) -> DemoResult:
    return demo_run.result


@pytest.fixture(scope="module")
def small_data() -> Iterator[Prepared]:
    """The demo's data from a tenth of the text: to read all of it takes a minute on slow cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CHARACTERS", 150_000)
        patch.setattr(training, "TOKENIZER_CHARACTERS", 40_000)
        patch.setattr(training, "CALIBRATION_SEQUENCES", 12)
        patch.setattr(training, "HELD_OUT_SEQUENCES", 12)
        yield training.prepare_data(seed=0)


@pytest.fixture
def quick_data(small_data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves reading Python's library once more, which takes far longer than the rest of such a test."""
    monkeypatch.setattr(training, "prepare_data", lambda seed: small_data)


def test_the_model_has_learned_every_domain(result: DemoResult) -> None:
    assert list(result.before.losses) == list(corpus.DOMAINS)
    knowing_nothing = math.log(training.VOCAB_SIZE)
    assert all(loss < 0.75 * knowing_nothing for loss in result.before.losses.values()), result.before.losses
    assert result.before.mean_loss < 0.5 * knowing_nothing


def test_damage_grows_with_the_share_removed(result: DemoResult) -> None:
    assert list(result.damages) == [0.25, 0.5, 0.75]
    quarter, half, most = result.damages.values()
    assert 0 < quarter < half < most
    assert result.damage_is_graded
    assert max(map(abs, result.before.divergences.values())) < 1e-9


def test_code_only_calibration_hurts_the_other_domains_more(result: DemoResult) -> None:
    mix, code = (result.variants[0.5, name].divergences for name in (MIX, CODE))
    assert code["arithmetic"] + code["records"] > 2 * (mix["arithmetic"] + mix["records"])
    assert code["code"] < mix["code"]


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a whole model in memory predicts behind each token of (N, L) but the last."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)  # type: ignore[no-any-return]


def test_figures_are_those_of_the_whole_models_in_memory(demo_run: DemoRun, result: DemoResult) -> None:
    before, after = load_whole(result.model), load_whole(result.output)
    for name, ids in demo_run.model.held_out.items():
        known, told = (log_probabilities(model, ids) for model in (before, after))
        losses = [-float(each.gather(-1, ids[:, 1:, None]).mean()) for each in (known, told)]
        kl = float((known.exp() * (known - told)).sum(-1).mean())
        half = result.variants[0.5, MIX]
        assert (result.before.losses[name], half.losses[name]) == pytest.approx(losses, abs=1e-6), name
        assert half.divergences[name] == pytest.approx(kl, abs=1e-6), name


def test_what_a_run_says_on_what_it_held_back_is_what_eval_says_afterwards(
    demo_run: DemoRun, result: DemoResult, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, "all", {name: rows[:60] for name, rows in demo_run.model.calibration.items()})
    output = tmp_path / "out"
    run(
        RunSettings(model=str(result.model), output=output, ratio=0.5, calibration=(str(recipe),), evaluate=True),
        quiet=True,
    )
    told = read_result(results_folder(output), TEXT_NAME)
    assert told is not None
    again = measured(output, result.model, held_out_recipe(output))
    assert told["data"]["fingerprint"] == again["data"]["fingerprint"]
    assert [(each["name"], each["sequences"]) for each in told["sources"]] == [(name, 6) for name in corpus.DOMAINS]
    for each, other in zip([*told["sources"], told["all"]], [*again["sources"], again["all"]], strict=True):
        assert each.keys() == other.keys() > {"kl", "kl_interval", "loss", "loss_interval", "hidden_error"}
        assert each["kl"] > 0.001
        for name, value in each.items():
            same = value if name == "name" else pytest.approx(value, abs=1e-6)
            assert other[name] == same, (each["name"], name)


def test_sizes_are_those_on_disk(result: DemoResult) -> None:
    half = result.variants[0.5, MIX]
    assert (result.before.experts, half.experts) == (32, 16)
    assert half.weight_bytes == sum(path.stat().st_size for path in result.output.glob("*.safetensors"))
    # Three matrices of 32 × 128 per expert, a router row of 128, four bytes each, in four blocks.
    removed = 4 * 16 * (3 * 32 * 128 + 128)
    assert result.before.parameters - half.parameters == removed
    assert abs(result.before.weight_bytes - half.weight_bytes - 4 * removed) < 100_000  # the files' headers differ


def test_output_reloads_with_its_tokenizer_and_writes_text(result: DemoResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(result.output)
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "3 + 4 ="}], tokenize=False)
    assert chat == "user: 3 + 4 =\n"
    prompt = tokenizer('{"type": "order", "id": 12', return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert output.shape[1] > prompt.shape[1]


def test_everything_is_printed(result: DemoResult, demo_run: DemoRun) -> None:
    text = "\n".join(demo_run.lines)
    # Nothing that takes seconds is silent: each variant is pruned, then measured.
    assert text.count("Measuring the unpruned model on held-out text ...") == 1
    assert text.count("Measuring it on held-out text ...") == len(VARIANTS)
    for figure in (*result.before.losses.values(), *result.variants[0.5, CODE].divergences.values()):
        assert f"{figure:.3f}" in text
    assert str(result.output) in text
    assert "the more was removed, the more was lost" in " ".join(text.split())


def test_the_shipped_model_is_small_and_what_its_recipe_says() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * 2**20
    recipe = json.loads((SHIPPED / "recipe.json").read_bytes())
    assert (recipe["steps"], recipe["seed"], recipe["threads"]) == (700, 0, 1)
    weights = load_file(SHIPPED / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert recipe["sha256"] == hashlib.sha256((SHIPPED / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_the_shipped_model_is_copied_in_float32_and_found_again(demo_run: DemoRun, folder: Path) -> None:
    stored, copied = (load_file(place / "model.safetensors") for place in (SHIPPED / "model", demo_run.model.folder))
    assert stored.keys() == copied.keys()
    for name, tensor in copied.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, stored[name].float()), name
    files = {path: path.stat().st_mtime_ns for path in demo_run.model.folder.parent.rglob("*")}
    again = shipped_model(folder, echo=lambda _: None)
    assert again.folder == demo_run.model.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.parent.rglob("*")} == files
    assert list(folder.glob(".*")) == []


def test_shipped_sequences_are_complete_and_never_overlap(demo_run: DemoRun) -> None:
    model = load_model(demo_run.model.folder.parent)
    assert list(model.calibration) == list(model.held_out) == list(corpus.DOMAINS)
    for name, held_out in model.held_out.items():
        calibration = model.calibration[name]
        assert calibration.shape == (training.CALIBRATION_SEQUENCES, training.SEQ_LEN)
        assert held_out.shape == (training.HELD_OUT_SEQUENCES, training.SEQ_LEN)
        assert not _windows(calibration, training.SHARED_TOKENS) & _windows(held_out, training.SHARED_TOKENS), name


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="/file/demo"):
        shipped_model(tmp_path / "file" / "demo", echo=lambda _: None)


@pytest.mark.usefixtures("quick_data")
def test_second_training_finds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = trained_model(tmp_path, steps=2, echo=lines.append)
    assert "step 2/2" in lines[-1]
    monkeypatch.setattr("measuring.training._train", None)
    again = trained_model(tmp_path, steps=2, echo=lambda _: None)
    assert again.folder == first.folder
    assert all(torch.equal(again.held_out[name], rows) for name, rows in first.held_out.items())
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.usefixtures("quick_data")
def test_the_tool_stores_a_training_as_the_package_has_it(tmp_path: Path) -> None:
    tool = program("train_demo")
    trained = trained_model(tmp_path / "demo", steps=1, echo=lambda _: None).folder.parent
    recipe = tool.ship(trained, tmp_path / "shipped")
    assert recipe == json.loads((tmp_path / "shipped" / "recipe.json").read_bytes())
    assert recipe.keys() == json.loads((SHIPPED / "recipe.json").read_bytes()).keys()
    names = [
        sorted(str(path.relative_to(place)) for path in place.rglob("*")) for place in (SHIPPED, tmp_path / "shipped")
    ]
    assert names[0] == names[1]


@pytest.mark.usefixtures("quick_data")
def test_the_tool_trains_a_model_and_runs_the_demo_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `tools/demo --train` calls it, from the first step to the last table. The package stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in SHIPPED.rglob("*")}
    monkeypatch.setattr("sys.argv", ["train_demo", "--train", "--steps", "2", "--seed", "3", "-o", str(tmp_path)])
    program("train_demo").main()
    text = capsys.readouterr().out
    assert "step 2/2" in text
    assert re.search(r"75% removed, mix +\d\.\d{3}", text)
    assert "pruned" in {path.name for path in tmp_path.iterdir()}
    assert {path: path.stat().st_mtime_ns for path in SHIPPED.rglob("*")} == before


@pytest.mark.usefixtures("quick_data")
def test_other_recipe_is_another_model(tmp_path: Path) -> None:
    first, second = (trained_model(tmp_path, steps=steps, echo=lambda _: None) for steps in (1, 2))
    assert first.folder != second.folder


@pytest.mark.usefixtures("quick_data")
def test_the_same_seed_gives_the_same_model_to_the_bit(tmp_path: Path) -> None:
    one, other = (trained_model(tmp_path / d, steps=3, echo=lambda _: None).folder for d in ("a", "b"))
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("quick_data")
def test_interrupted_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("measuring.training._train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained_model(tmp_path, steps=3, echo=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_no_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--steps 0 is too small: at least 1"):
        trained_model(tmp_path, steps=0)


def test_parts_never_overlap(small_data: Prepared) -> None:
    for name, domain in small_data[1].items():
        assert len(domain.calibration) == training.CALIBRATION_SEQUENCES
        assert len(domain.held_out) == training.HELD_OUT_SEQUENCES
        parts = (domain.train, domain.calibration, domain.held_out)
        for one, other in combinations([_windows(part, training.SHARED_TOKENS) for part in parts], 2):
            assert not one & other, name


def test_data_is_the_same_every_time(small_data: Prepared) -> None:
    again = training.prepare_data(seed=0)[1]
    for name, domain in small_data[1].items():
        for part in ("train", "calibration", "held_out"):
            assert torch.equal(getattr(again[name], part), getattr(domain, part)), (name, part)


def _windows(sequences: torch.Tensor, tokens: int) -> set[bytes]:
    """Every run of so many tokens within a sequence."""
    return {run.tobytes() for run in sequences.to(torch.int16).unfold(1, tokens, 1).reshape(-1, tokens).numpy()}


@pytest.mark.parametrize("name", corpus.DOMAINS)
def test_corpus_is_the_same_every_time(name: str) -> None:
    first, second = corpus.DOMAINS[name](5), corpus.DOMAINS[name](5)
    assert [next(first) for _ in range(5)] == [next(second) for _ in range(5)]


def test_tokenizer_gives_back_what_it_took(small_data: Prepared) -> None:
    tokenizer = small_data[0]
    text = "Größe = 1024 # ✓\n\tdef f(): return {'a': 77}"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    seven = tokenizer("7").input_ids
    assert tokenizer("77").input_ids == 2 * seven
