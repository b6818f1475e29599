"""What a run will need, where its states go and how much it takes at a time: decided and said before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from streamprune.calibration.sequences import Calibration
from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.errors import ResourceError, SettingsError
from streamprune.hardware.memory_plan import Limit, Needs, RefitNeeds, Room, choose
from streamprune.planning import memory_needs as memory_facts
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.states import HiddenStates
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU, known_family, prepare_whole, prune
from tests.peak import Peak
from tests.thorough import crossed, mostly_thorough
from tests.tiny import FAMILIES, make_model, tiny_config, write_token_ids


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tiny_config(FAMILIES[0]))


@pytest.mark.parametrize(
    "name",
    mostly_thorough(
        ["qwen3_moe", "gemma4_text", "glm_moe_dsa", "qwen4_exp_text", "dbrx"], ("qwen3_moe", "gemma4_text")
    ),
)
def test_the_predicted_states_are_the_real_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = HiddenStates.store

    def store(self: HiddenStates, number: int, state: BatchState) -> None:
        nonlocal largest
        plain(self, number, state)
        leaves = pytree.tree_leaves([(s.output, s.carried) for s in self._states])
        largest = max(largest, sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)))

    plans = []
    plain_plan = memory_facts.find_needs
    monkeypatch.setattr(HiddenStates, "store", store)
    patched = "streamprune.pipeline.run.find_needs"
    monkeypatch.setattr(patched, lambda *a: plans.append(plain_plan(*a)) or plans[-1])
    source = make_model(tmp_path / "model", tiny_config(known_family(name)))
    prune(source, tmp_path / "out", keep=known_family(name).keep)
    assert largest == plans[0].states


@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    crossed(
        ["qwen3_moe", "gpt_oss", "llama4_text"], [torch.bfloat16, torch.float32], ["bfloat16", "float32"],
        usual=[("qwen3_moe", torch.bfloat16, "float32"), ("qwen3_moe", torch.float32, "float32"),
               ("gpt_oss", torch.float32, "bfloat16"), ("llama4_text", torch.float32, "float32")],
    ),
)  # fmt: skip
def test_weights_take_no_more_while_they_are_loaded_than_predicted(
    name: str, stored: torch.dtype, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts one by one or all in one tensor, in the dtype that they are computed with or in another."""
    # As the command line sets it: what other threads make would not be seen here.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    family = known_family(name)
    source = make_model(tmp_path / "model", tiny_config(family))
    for path in source.glob("*.safetensors"):
        tensors = {key: tensor.to(stored) for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    settings = RunSettings(model=str(source), output=tmp_path / "out", keep=family.keep, dtype=dtype)
    prepared = prepare_whole(settings)
    ids = torch.zeros(8, dtype=torch.long)
    predicted = memory_facts.find_needs(settings, prepared, Calibration((ids,), ("test",), (0,), ""))
    weights = LayerWeights(prepared, CPU)
    largest = 0
    for index in range(prepared.skeleton.layer_count):
        with Peak() as peak, weights.layer(index):
            pass
        largest = max(largest, peak.nbytes)
    # (Between tensors that lie in one memory there are gaps of up to 63 bytes.)
    assert 0.7 * predicted.loading < largest < predicted.loading + 4096
    with Peak() as peak:
        weights.load_non_layer_weights()
    weights.close()
    assert peak.nbytes <= predicted.non_layer + predicted.loading


def needs(**changes: int) -> Needs:
    values = {"layer": 100, "reading": 90, "loading": 110, "staging": 30, "non_layer": 20, "states": 200} | changes
    return Needs(**values, workspace=lambda tokens: tokens, sequences=100, longest=8, tokens=800, itemsize=4)


def room(device: int, host: int | None = None, disk: int = 10**6) -> Room:
    return Room(
        *(size if size is None else Limit(size, f"{size} are free", "do this") for size in (device, host, disk))
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (room(10**4, 10**4), ("device", 10**4)),  # everything at once: the bound itself
        (room(1120, 10**4), ("device", 10**4)),
        (room(380, 10**4), ("device", 56)),  # 20 + 200 + 100 leaves 60 tokens: seven sequences of 8
        # On the card there would be 20 tokens, less than the usual 24. From RAM, six micro-batches of states are on the
        # card, at a quarter a token: 20 + 100 leaves 88 tokens.
        (room(340, 10**4), ("ram", 88)),
        # Page-locked in powers of two: 6 for 24 tokens take 8, and staging 30. For 64 tokens nothing is lost.
        (room(340, 296), ("ram", 64)),
        (room(340, 295), ("disk", 88)),
        (room(170, 10**4), ("ram", 16)),
        (room(10**4), ("ram", 10**4)),
        (room(343), ("disk", 144)),  # one memory: 343 leaves 23 tokens beside the states
        (room(144 + 200, None, 10), ("ram", 24)),
        (room(336, None, 10), ("ram", 16)),  # no disk: fewer than usual is better than nothing
    ],
)
def test_states_and_micro_batches_go_where_they_fit(space: Room, expected: tuple[str, int]) -> None:
    plan = choose(needs(), space, "auto", 10**4, 24)
    assert (plan.place, plan.batch_tokens) == expected


@pytest.mark.parametrize(
    ("space", "states", "words"),
    [
        (room(129), "disk", "The largest layer .* 129 are free. Even without .* You can do this"),
        (room(327), "ram", r"hidden states of 800 calibration tokens \(200 B\) need 330 B .* Use --states disk"),
        (room(327, 10**4), "device", "need 330 B .* Use --states ram or disk"),
        (room(10**4, 229), "ram", "need 230 B of memory, but 229 are free. Use --states disk"),
        (room(10**4, 33), "disk", r"Loading .* on their way to the disk \(6 B\) need 36 B of memory, but 33 are free"),
        (room(10**4, 29), "device", "Loading a layer .* need 30 B of memory, but 29 are free. You can do this"),
        (room(10**4, None, 199), "disk", "do not fit on the disk: 199 are free. You can free 1 B, do this"),
        (room(127 + 48, None), "auto", None),
    ],
)
def test_what_cannot_be_is_refused_with_numbers_and_a_remedy(space: Room, states: str, words: str | None) -> None:
    if words is None:
        assert choose(needs(), space, states, 10**4, 24).place == "disk"
        return
    with pytest.raises(ResourceError, match=words):
        choose(needs(), space, states, 10**4, 24)
    with pytest.raises(ResourceError, match="At least one sequence is computed at a time"):
        choose(needs(loading=0), room(127), "disk", 10**4, 24)


def test_scores_of_channels_take_memory_where_they_are() -> None:
    """10 while a layer is scored, where it is computed; 50 for all layers in RAM."""
    more, plain = needs(sums=10, recorded=50), needs()
    one, another = (choose(each, room(10**4), "disk", 24, 24) for each in (more, plain))
    assert one.device_bytes - another.device_bytes == 60
    one, another = (choose(each, room(10**4, 10**4), "device", 24, 24) for each in (more, plain))
    assert one.device_bytes - another.device_bytes == 10
    assert "scores of channels 50 B in RAM" in one.describe()
    assert "scores of channels" not in another.describe()
    message = r"Loading a layer \(30 B\), the scores of channels \(50 B; none with --no-channels\) need 80 B"
    with pytest.raises(ResourceError, match=message):
        choose(more, room(10**4, 79), "device", 24, 24)
    with pytest.raises(ResourceError, match=r"and the scores of channels .* need"):
        choose(more, room(187), "disk", 24, 24)


@pytest.mark.parametrize("channels", [True, False])
def test_what_channels_take_is_counted(model: Path, tmp_path: Path, channels: bool) -> None:
    settings = RunSettings(model=str(model), output=tmp_path / "out", keep=4, channels=channels)
    ids = torch.zeros(8, dtype=torch.long)
    text = Calibration((ids, ids), ("a", "b"), (0, 1), "")
    found = memory_facts.find_needs(settings, prepare_whole(settings), text)
    # Two sources, eight experts, 32 channels; four layers.
    energies = 2 * 8 * 32 if channels else 0
    assert (found.sums, found.recorded) == (24 * energies, (4 * 4 + 64) * energies)


@pytest.mark.parametrize(("name", "is_less"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_less_workspace_is_planned_where_all_experts_are_recorded(name: str, is_less: bool, tmp_path: Path) -> None:
    """Not for those with biases, nor where text goes through pruned layers. A GPU's parts are larger than a CPU's."""
    family = known_family(name)
    source = make_model(tmp_path / "model", tiny_config(family))
    text = Calibration((torch.zeros(8, dtype=torch.long),), ("a",), (0,), "")

    def workspace(device: str, **changes: Any) -> int:
        settings = RunSettings(model=str(source), output=tmp_path / "out", keep=family.keep, **changes)
        prepared = prepare_whole(settings)
        return memory_facts.find_needs(settings, prepared, text, torch.device(device)).workspace(10**5)

    both = workspace("cpu"), workspace("cpu", propagate="pruned")
    assert (both[0] < both[1]) is is_less
    assert (workspace("cuda") > both[0]) is is_less


@pytest.mark.parametrize(
    ("space", "ahead"), [(room(20 + 200 + 100 + 24 + 90), True), (room(20 + 200 + 100 + 24 + 89), False)]
)
def test_the_next_block_is_read_ahead_where_it_fits_too(space: Room, ahead: bool) -> None:
    assert choose(needs(), space, "ram", 24, 24).ahead is ahead


@pytest.mark.parametrize(
    "options", [{"vram_gib": 0.0}, {"ram_gib": -1.0}, {"ram_gib": float("nan")}, {"ram_gib": 1e308}, {"states": "tape"}]
)
def test_nonsense_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"--(vram-gib|ram-gib|states) "):
        RunSettings(model="m", output=Path("o"), keep=4, **options)


def test_a_cap_on_a_card_that_is_not_used_is_a_usage_error(model: Path, tmp_path: Path) -> None:
    arguments = ["run", str(model), "-o", str(tmp_path / "out"), "--keep", "4", "--vram-gib", "8", "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--vram-gib 8 is about a GPU's memory" in result.stderr


def test_the_run_says_beforehand_what_it_will_need(model: Path, tmp_path: Path) -> None:
    ids = write_token_ids(tmp_path / "ids.jsonl")
    arguments = ["run", str(model), "-o", str(tmp_path / "out"), "--keep", "4", "--calibration", str(ids)]
    result = CliRunner().invoke(main, [*arguments, "--states", "disk", "--batch-tokens", "50"])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    (line,) = (line for line in lines if line.startswith("memory for the run: "))
    assert lines.index(line) < next(number for number, each in enumerate(lines) if each.startswith("layer 0/3"))
    # 4 · 24 tokens of 64 values in float32; a block's parameters are those of the tiny config.
    assert "hidden states 24.00 KiB on disk" in line
    assert "for 48 tokens at a time" in line
    assert "largest layer 242.62 KiB (242.62 KiB while it is loaded), the next one read ahead 242.62 KiB" in line
    assert "embeddings 64.31 KiB" in line


def test_each_process_has_all_factors_of_a_refit_and_the_largest_share_of_its_tokens() -> None:
    refit = RefitNeeds(collected=2000, tokens=200, factors=70)
    # 800 tokens in 10 micro-batches of 80: of 4 processes one has 3, and all 200 tokens may be among their 240.
    shared = replace(needs(), processes=4, refit=refit)
    assert shared.collected_here(80) == 70 + 2000
    # In 100 micro-batches of 8, it has 25, with 200 tokens; of 10 processes 10, with 80.
    assert replace(shared, processes=10).collected_here(8) == 70 + 800
    assert needs().collected_here(8) == 0
