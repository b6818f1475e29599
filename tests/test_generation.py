"""Generation health: models made to loop are told from models that find their end, through transformers' generate."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.calibration import chat
from streamprune.calibration.sequences import Calibration
from streamprune.config import EvalSettings
from streamprune.errors import CalibrationError, CheckpointError, NonFiniteError, ResourceError, SettingsError
from streamprune.evaluation import generation
from streamprune.evaluation.generation import GenerationSettings, generation_health
from streamprune.evaluation.terminal import generation_lines
from streamprune.models import full_model as loading
from streamprune.progress import Progress
from tests.helpers import prune
from tests.tiny import FAMILIES, make_model, tiny_config
from tests.tokenizer import save_tokenizer
from tests.walkers import END, LAST, THINKING, make_walker, ring, straight

RING = 190
#: What texts begin with: no token of the ring.
LETTERS = range(40, 140)


def text(*sources: str, sequences: int = 4, length: int = 24) -> Calibration:
    generator = torch.Generator().manual_seed(7)
    made = [
        torch.randint(LETTERS[0], LETTERS[-1], (length,), generator=generator)
        for _ in sources
        for _ in range(sequences)
    ]
    return Calibration(tuple(made), sources, tuple(i for i in range(len(sources)) for _ in range(sequences)), "0" * 64)


def health(
    model: Path,
    against: Path | None = None,
    prompts: Path | None = None,
    data: Calibration | None = None,
    **options: Any,
) -> tuple[dict[str, Any], list[str]]:
    """The result, which JSON can hold, and what was said."""
    said = io.StringIO()
    of_model = {name: options.pop(name) for name in ("seed", "trust_remote_code") if name in options}
    settings = EvalSettings(model=str(model), against=None if against is None else str(against), **of_model)
    generation = GenerationSettings(prompts=prompts, **{"max_new_tokens": 200, "prompt_tokens": 16} | options)
    if data is None and prompts is None:
        data = text("letters", "more")
    result = generation_health(settings, generation, data, Progress(0, False, said))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result, said.getvalue().splitlines()


def mode(result: dict[str, Any], decoding: str, form: str = "text", thinking: bool | None = None) -> dict[str, Any]:
    wanted = {"decoding": decoding, "form": form, "thinking": thinking}
    (found,) = [each for each in result["modes"] if all(each[key] == value for key, value in wanted.items())]
    return found


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_walker(tmp_path_factory.mktemp("healthy"), straight())


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every letter leads into a ring of five tokens."""
    return make_walker(tmp_path_factory.mktemp("looping"), dict.fromkeys(LETTERS, RING) | ring(RING, 5))


def test_a_model_that_finds_its_end_is_healthy(healthy: Path) -> None:
    result, _ = health(healthy)
    assert (result["verdict"], result["advice"]) == ("healthy", [])
    for each in result["modes"]:
        assert (each["prompts"], each["ended"], each["looped"], each["repeated_4grams"]) == (8, 1.0, 0.0, 0.0)
        assert [source["name"] for source in each["sources"]] == ["letters", "more"]
    assert [(each["decoding"], each["form"]) for each in result["modes"]] == [("greedy", "text"), ("sampled", "text")]
    assert result["settings"]["sampling"] == {"temperature": 1.0, "top_k": 0}
    example = result["examples"][0]
    last = text("letters").sequences[0][15].item()
    # It walks on from the prompt's last token to the last of all.
    assert mode(result, "greedy")["longest_ended"] >= LAST - 1 - last
    assert (example["ended"], example["looped"]) == (True, False)
    assert "Few loops, or none." in generation_lines(result)


def test_a_model_made_to_loop_is_reported(looping: Path, healthy: Path) -> None:
    result, _ = health(looping, against=healthy)
    assert result["verdict"] == "loops"
    greedy = mode(result, "greedy")
    assert (greedy["looped"], greedy["ended"], greedy["original"]["looped"]) == (1.0, 0.0, 0.0)
    # 200 tokens in a ring of five have five different 4-grams.
    assert greedy["repeated_4grams"] == pytest.approx(1 - 5 / 197)
    assert greedy["original"]["ended"] == 1.0
    assert result["examples"][0]["looped"]
    assert result["advice"][0] == "8 of 8 continuations (greedy, text) loop; of the original's 0."
    # Sampling does not help a model that is so sure, and there is nothing to switch off: neither is advised.
    assert not any("Sample" in sentence or "thinking" in sentence for sentence in result["advice"])
    rows = [" ".join(line.split()) for line in generation_lines(result)]
    assert "greedy, text 8 0.0% 100.0% 0.975 100.0% 0.0% 0.000" in rows
    assert "It loops." in rows


def test_alone_it_is_reported_as_well(looping: Path) -> None:
    result, _ = health(looping)
    assert (result["verdict"], result["against"]) == ("loops", None)
    assert "original" not in mode(result, "greedy")
    assert any("--against" in sentence for sentence in result["advice"])


def test_what_the_original_does_as_well_is_not_held_against_it(looping: Path) -> None:
    result, _ = health(looping, against=looping)
    assert mode(result, "greedy")["original"]["looped"] == mode(result, "greedy")["looped"] == 1.0
    assert (result["verdict"], result["advice"]) == ("healthy", [])
    assert "It does not loop significantly more than the original." in generation_lines(result)


def test_a_few_more_loops_than_the_originals_may_be_chance(tmp_path: Path, healthy: Path) -> None:
    data = text("letters", sequences=12)
    ends = sorted({int(sequence[15]) for sequence in data.sequences})

    def of(count: int) -> dict[str, Any]:
        # The straight way, but that from some prompts' last tokens it goes into the ring.
        follows = dict.fromkeys(LETTERS, END) | ring(RING, 3) | dict.fromkeys(ends[:count], RING)
        return health(make_walker(tmp_path / str(count), follows), healthy, data=data, prompts_per_source=12)[0]

    few, many = of(1), of(5)
    assert mode(few, "greedy")["original"]["looped_only_here"] < 4
    assert few["verdict"] == "healthy"
    assert mode(many, "greedy")["original"]["looped_only_here"] >= 4
    assert many["verdict"] == "loops"


def test_thinking_that_loops_is_told_from_answering(tmp_path: Path) -> None:
    # The byte-level tokenizer begins with the exclamation mark.
    thinks = ord("T") - ord("!") + 3
    model = make_walker(
        tmp_path / "model", straight(without=[thinks]) | {thinks: RING} | ring(RING, 60), template=THINKING
    )
    prompts = tmp_path / "prompts.jsonl"
    # As exporters write them: every column in every line. (And a source's name that has to be made printable.)
    contents = ("hello ", "hello hello ", [{"type": "text", "text": "hello hello "}], "hello hello hello ")
    lines = [
        {"prompt": None, "messages": [{"role": "user", "content": content}], "source": "chats\n"}
        for content in contents
    ]
    prompts.write_text("\ufeff" + "\n".join(map(json.dumps, lines)))
    result, _ = health(model, prompts=prompts)
    assert result["settings"]["thinking_switch"] == "enable_thinking"
    assert {source["name"] for source in mode(result, "greedy", "chat", True)["sources"]} == {"chats"}
    for name in ("greedy", "sampled"):
        assert mode(result, name, "chat", True)["looped"] == 1.0
        assert (mode(result, name, "chat", False)["looped"], mode(result, name, "chat", False)["ended"]) == (0.0, 1.0)
    assert result["verdict"] == "loops"
    assert any("enable_thinking=False" in sentence and "0 of 4" in sentence for sentence in result["advice"])
    assert any(line.split()[:4] == ["greedy,", "chat,", "thinking", "on"] for line in generation_lines(result))


def test_sampling_is_advised_where_it_helps(tmp_path: Path) -> None:
    follows = dict.fromkeys(LETTERS, RING) | ring(RING, 5)
    result, _ = health(make_walker(tmp_path / "model", follows, sharpness=0.1))
    assert (mode(result, "greedy")["looped"], mode(result, "sampled")["looped"]) == (1.0, 0.0)
    assert any("Sample instead" in sentence for sentence in result["advice"])


def test_the_same_seed_samples_the_same(tmp_path: Path) -> None:
    model = make_walker(tmp_path / "model", straight(), sharpness=0.2, temperature=0.7, top_p=0.9)
    before = torch.random.get_rng_state()
    first, again, other = (health(model, seed=seed)[0] for seed in (3, 3, 4))
    assert first == again
    assert first["modes"] != other["modes"]
    assert mode(first, "greedy") == mode(other, "greedy")
    assert first["settings"]["sampling"] == {"temperature": 0.7, "top_k": 0, "top_p": 0.9}
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_template_that_does_harm_costs_the_chats_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 1.0)
    model = make_walker(tmp_path / "model", straight(), template="{{ 9 ** (9 ** (8 + messages|length)) }}")
    result, said = health(model)
    assert {each["form"] for each in result["modes"]} == {"text"}
    assert "No chats were tried" in result["notes"][0]
    assert f"note: {result['notes'][0]}" in said
    # A constant is worked out by whoever compiles the template, or asks Jinja for its variables.
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ 'x' * 10 ** 12 }}{{ enable_thinking }}")
    assert "No chats were tried" in health(model)[0]["notes"][0]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(CalibrationError, match=r"prompts\.jsonl line 1"):
        health(model, prompts=prompts)


def test_a_switch_that_makes_no_difference_is_none(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking is defined %}{% endif %}{% if thinking %}!{% endif %}"
    model = make_walker(tmp_path / "model", straight(), template=template)
    result, _ = health(model, data=text("letters", sequences=2))
    assert (result["settings"]["thinking_switch"], len(result["modes"])) == ("thinking", 6)


def test_without_a_tokenizer_ids_are_continued(tmp_path: Path) -> None:
    model = make_walker(tmp_path / "model", straight())
    for path in model.glob("*token*"):
        path.unlink()
    result, _ = health(model)
    assert result["verdict"] == "healthy"
    assert "Only token ids" in result["notes"][0]
    assert all(part.isdigit() for part in result["examples"][0]["prompt"].split())


def test_memory_that_runs_out_halves_the_batch(healthy: Path, looping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = generation._batch

    def scarce(loaded: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return None if len(prompts) > 2 else real(loaded, prompts, *rest)

    monkeypatch.setattr(generation, "_batch", scarce)
    _, said = health(healthy)
    assert sizes[:6] == [8, 4, 2, 2, 2, 2]
    assert "note: memory ran out; 4 continuations at a time from now on." in said
    monkeypatch.setattr(generation, "_batch", lambda *_: None)
    with pytest.raises(ResourceError, match="a single continuation of 16 tokens on cpu"):
        health(healthy)


def test_within_a_batch_it_says_how_far_it_is(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LINE_SECONDS", 0.0)
    _, said = health(healthy, max_new_tokens=2, batch=4)
    lines = [line for line in said if "in progress" in line]
    assert lines[:3] == [
        "generation, greedy: 0 of 8 continuations done, 4 in progress (token 1 of at most 2)",
        "generation, greedy: 0 of 8 continuations done, 4 in progress (token 2 of at most 2)",
        "generation, greedy: 4 of 8 continuations done, 4 in progress (token 1 of at most 2)",
    ]


def test_an_original_that_does_not_fit_is_left_out(
    healthy: Path, looping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = loading.find_full_model(str(healthy)).needed_bytes
    free = iter([needed, needed - 1])
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: next(free))
    result, said = health(looping, against=healthy)
    assert result["verdict"] == "loops"
    assert "original" not in mode(result, "greedy")
    assert "The original was not compared" in result["notes"][-1]
    assert f"note: {result['notes'][-1]}" in said
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(ResourceError, match=r"needs about .* to be loaded in full"):
        health(healthy)


def test_positions_are_kept_to(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    model = make_model(tmp_path / "model", tiny_config(family))
    save_tokenizer(model, chat=False)
    result, said = health(model, max_new_tokens=9999)
    assert result["settings"]["max_new_tokens"] == 240
    assert "note: Only 240 new tokens: the model has 256 positions." in said
    with pytest.raises(SettingsError, match="A prompt has 256 tokens"):
        health(model, prompt_tokens=400, data=text("a", sequences=1, length=256))


def test_what_cannot_be_is_refused(tmp_path: Path, healthy: Path) -> None:
    with pytest.raises(SettingsError, match="--max-new-tokens 0"):
        GenerationSettings(max_new_tokens=0)
    with pytest.raises(SettingsError, match="no text to continue"):
        generation_health(EvalSettings(model=str(healthy)), GenerationSettings(), None, Progress(0, True))
    prompts = tmp_path / "prompts.jsonl"
    for line, words in (
        ("", "has no prompts"),
        ('{"text": "x"}', "line 1 is .*'prompt'"),
        ("{", "line 1 is not valid JSON"),
        (
            '{"prompt": "a"}\n{"messages": ["a"]}',
            r"line 2 is .*Expected `object`, got `str` - at `\$.messages\[0\]`.*objects with a 'role'",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no chat template"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            r"a part .* not text \(image\)",
        ),
    ):
        prompts.write_text(line)
        with pytest.raises(CalibrationError, match=words):
            health(healthy, prompts=prompts)
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        health(healthy, prompts=tmp_path / "none.jsonl")


def test_models_that_lack_weights_or_give_no_numbers_are_refused(tmp_path: Path) -> None:
    model = make_walker(tmp_path / "model", straight())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .* missing_keys"):
        health(model)
    broken = make_walker(tmp_path / "broken", {3: 4}, sharpness=float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        health(broken)
    with pytest.raises(CheckpointError, match="token 999, but the model has only 256"):
        health(
            make_walker(tmp_path / "small", straight()),
            data=Calibration((torch.tensor([3, 999]),), ("a",), (0,), "0" * 64),
        )


def test_models_with_blocks_of_different_sizes_need_their_code(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    source = make_model(tmp_path / "source", tiny_config(family))
    save_tokenizer(source, chat=False)
    prune(source, tmp_path / "pruned", schedule="linear-decrease", ratio=0.4, keep=None)
    with pytest.raises(CheckpointError, match=r"different numbers of experts.*--trust-remote-code"):
        health(tmp_path / "pruned")
    data = text("letters", sequences=2)
    result, _ = health(tmp_path / "pruned", against=source, data=data, trust_remote_code=True, max_new_tokens=70)
    assert mode(result, "greedy")["prompts"] == 2
    assert "original" in mode(result, "greedy")
