"""The demo: its data, its cache, and the two findings that it is there to show."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune.calibration import builtin_text as corpus
from streamprune.config import RunSettings
from streamprune.demo import data
from streamprune.demo.demo import CODE, MIX, DemoResult, table, write_recipe
from streamprune.demo.train import trained_model
from streamprune.errors import SettingsError
from streamprune.evaluation.held_out import held_out_recipe
from streamprune.pipeline.run import run
from streamprune.reporting.evaluations import TEXT_NAME, read_result, results_folder
from tests.conftest import DEMO_STEPS as STEPS
from tests.conftest import DemoRun
from tests.helpers import load_whole
from tests.test_evaluate import measured

#: The tokenizer, and the sequences by domain.
Prepared = tuple[Any, dict[str, data.DomainData]]

# The trained model is made once: all of its tests belong to one worker.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def folder(demo_run: DemoRun) -> Path:
    return demo_run.folder


@pytest.fixture(scope="module")
def told(demo_run: DemoRun) -> list[str]:
    """What the demo printed."""
    return demo_run.told


@pytest.fixture(scope="module")
def result(demo_run: DemoRun) -> DemoResult:
    return demo_run.result


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return data.prepare_data(seed=0)


@pytest.fixture
def quick_data(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves reading Python's library once more, which takes ten times as long as the rest of such a test."""
    monkeypatch.setattr("streamprune.demo.data.prepare_data", lambda seed: prepared)


def test_training_teaches_every_domain(result: DemoResult) -> None:
    assert list(result.before.losses) == list(corpus.DOMAINS)
    knowing_nothing = math.log(data.VOCAB_SIZE)
    assert all(loss < 0.75 * knowing_nothing for loss in result.before.losses.values()), result.before.losses
    assert result.before.mean_loss < 0.5 * knowing_nothing


def test_damage_grows_with_the_share_removed(result: DemoResult) -> None:
    assert [ratio for ratio, _ in result.damages] == [0.25, 0.5, 0.75]
    quarter, half, most = (damage for _, damage in result.damages)
    assert 0 < quarter < half < most
    assert result.damage_is_graded
    assert max(map(abs, result.before.divergences.values())) < 1e-9


def test_code_only_calibration_hurts_the_other_domains_more(result: DemoResult) -> None:
    mix, code = (result.variant(0.5, name).divergences for name in (MIX, CODE))
    assert code["arithmetic"] + code["records"] > 2 * (mix["arithmetic"] + mix["records"])
    assert code["code"] < mix["code"]


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a whole model in memory predicts behind each token of (N, L) but the last."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)  # type: ignore[no-any-return]


def test_figures_are_those_of_the_whole_models_in_memory(folder: Path, result: DemoResult) -> None:
    held_out = trained_model(folder, steps=STEPS, threads=1, echo=lambda _: None).held_out
    before, after = load_whole(result.model), load_whole(result.output)
    for name, ids in held_out.items():
        known, told = (log_probabilities(model, ids) for model in (before, after))
        losses = [-float(each.gather(-1, ids[:, 1:, None]).mean()) for each in (known, told)]
        kl = float((known.exp() * (known - told)).sum(-1).mean())
        half = result.variant(0.5)
        assert (result.before.losses[name], half.losses[name]) == pytest.approx(losses, abs=1e-6), name
        assert half.divergences[name] == pytest.approx(kl, abs=1e-6), name


def test_what_a_run_says_on_what_it_held_back_is_what_eval_says_afterwards(
    result: DemoResult, prepared: Prepared, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, "all", {name: part.calibration[:60] for name, part in prepared[1].items()})
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
    half = result.variant(0.5)
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


def test_everything_is_told(result: DemoResult, told: list[str]) -> None:
    text = "\n".join(told)
    assert f"step {STEPS}/{STEPS}" in text
    for figure in (*result.before.losses.values(), *result.variant(0.5, CODE).divergences.values()):
        assert f"{figure:.3f}" in text
    assert str(result.output) in text
    assert "the more was removed, the more was lost" in " ".join(text.split())


def test_second_call_finds_the_model(folder: Path, result: DemoResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.demo.train._train", None)
    again = trained_model(folder, steps=STEPS, threads=1, echo=lambda _: None)
    assert again.seconds is None
    assert result.training_seconds is not None
    assert again.folder == result.model
    assert list(folder.glob(".*")) == []


@pytest.mark.usefixtures("quick_data")
def test_other_recipe_is_another_model(tmp_path: Path) -> None:
    first, second = (trained_model(tmp_path, steps=steps, threads=1, echo=lambda _: None) for steps in (1, 2))
    assert first.folder != second.folder
    assert second.seconds is not None


@pytest.mark.usefixtures("quick_data")
def test_one_thread_gives_the_same_model_to_the_bit(tmp_path: Path) -> None:
    one, other = (trained_model(tmp_path / d, steps=3, threads=1, echo=lambda _: None).folder for d in ("a", "b"))
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("quick_data")
def test_interrupted_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streamprune.demo.train._train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained_model(tmp_path, steps=3, echo=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("steps", "threads"), [(0, None), (5, 0)])
def test_impossible_numbers_are_refused(tmp_path: Path, steps: int, threads: int | None) -> None:
    with pytest.raises(SettingsError, match="at least one"):
        trained_model(tmp_path, steps=steps, threads=threads)


def test_data_is_the_same_every_time(prepared: Prepared, folder: Path, result: DemoResult) -> None:
    kept = trained_model(folder, steps=STEPS, threads=1, echo=lambda _: None)
    assert kept.folder == result.model
    for name, domain in prepared[1].items():
        assert torch.equal(kept.calibration[name], domain.calibration), name
        assert torch.equal(kept.held_out[name], domain.held_out), name


def test_parts_never_overlap(prepared: Prepared) -> None:
    for name, domain in prepared[1].items():
        assert len(domain.calibration) == data.CALIBRATION_SEQUENCES
        assert len(domain.held_out) == data.HELD_OUT_SEQUENCES
        parts = (domain.train, domain.calibration, domain.held_out)
        for one, other in combinations([_windows(part, data.SHARED_TOKENS) for part in parts], 2):
            assert not one & other, name


def _windows(sequences: torch.Tensor, tokens: int) -> set[bytes]:
    """Every run of so many tokens within a sequence."""
    return {run.tobytes() for run in sequences.to(torch.int16).unfold(1, tokens, 1).reshape(-1, tokens).numpy()}


@pytest.mark.parametrize("name", corpus.DOMAINS)
def test_corpus_is_the_same_every_time(name: str) -> None:
    first, second = corpus.DOMAINS[name](5), corpus.DOMAINS[name](5)
    assert [next(first) for _ in range(5)] == [next(second) for _ in range(5)]


def test_tokenizer_gives_back_what_it_took(prepared: Prepared) -> None:
    tokenizer = prepared[0]
    text = "Größe = 1024 # ✓\n\tdef f(): return {'a': 77}"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    seven = tokenizer("7").input_ids
    assert tokenizer("77").input_ids == 2 * seven


def test_table_is_aligned() -> None:
    assert table(["model", "loss"], [["a", "1.5"], ["longer", "10.25"]]) == [
        "  model    loss",
        "  a         1.5",
        "  longer  10.25",
    ]
