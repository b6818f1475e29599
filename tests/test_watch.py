"""The caps on what a run takes of a GPU and of RAM, and the watch over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pynvml as real
import pytest
import torch
from torch import nn

from streamprune.config import RunSettings
from streamprune.errors import ResourceError
from streamprune.hardware import device as devices
from streamprune.hardware import memory as machine
from streamprune.hardware.device import USUAL_CONTEXT, MemoryWatch, newcomers
from streamprune.hardware.gpus import GpuProcess
from streamprune.planning import memory_needs as memory_facts
from streamprune.streaming.forward import LayerForward
from streamprune.work.saved_states import BatchState
from tests.fake_nvml import NOBODY, FakeCard, install
from tests.helpers import prune
from tests.interruptions import call
from tests.tiny import FAMILIES, make_model, tiny_config, write_token_ids

MIB = 1024**2
QWEN = FAMILIES[0]
PLAIN_RUN_BLOCK = LayerForward.run_layer


def test_resident_memory_above_the_cap_shrinks_and_in_the_end_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played: resident memory that falls with the micro-batch, and then does not fall far enough."""
    at_a_time = 0
    model = make_model(tmp_path / "model", tiny_config(QWEN))

    def run_layer(self: LayerForward, index: int, block: nn.Module, ids: torch.Tensor, state: BatchState) -> BatchState:
        nonlocal at_a_time
        at_a_time = len(ids)
        return PLAIN_RUN_BLOCK(self, index, block, ids, state)

    undisturbed = prune(model, tmp_path / "undisturbed")
    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    monkeypatch.setattr(machine, "resident_bytes", lambda: at_a_time * 300 * MIB)
    result = prune(model, tmp_path / "out", ram_gib=1.0)
    assert [layer.tokens for layer in result.layers] == [layer.tokens for layer in undisturbed.layers]
    assert [layer.kept for layer in result.layers] == [layer.kept for layer in undisturbed.layers]
    shrinks = [(shrink["sequences"], shrink["to"]) for shrink in result.summary["shrinks"]]
    assert shrinks == [(4, 2)]
    assert "1.17 GiB are resident, with --ram-gib 1" in result.summary["shrinks"][0]["reason"]
    at_a_time = 0
    with pytest.raises(ResourceError, match=r"are resident, with --ram-gib 0\.25 .* single sequence .* --states disk"):
        prune(model, tmp_path / "never", ram_gib=0.25)


def test_who_takes_memory_on_the_card_meanwhile_is_named() -> None:
    now = [GpuProcess(7, "old", 500 * MIB), GpuProcess(8, "grown", 600 * MIB), GpuProcess(9, "new", 10 * MIB)]
    assert [process.pid for process in newcomers({7: 490 * MIB, 8: 100 * MIB}, now)] == [8, 9]


def test_the_watch_over_a_card_names_newcomers_and_keeps_to_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML and torch's allocator are played: what follows from their numbers is what counts here."""
    reserved, context, own = 1024, 300, (os.getpid(), 1024 + 300)
    card = FakeCard(used=4096, total=8192, compute=[own], graphics=[(NOBODY, 200)])
    # Of the other GPU nothing is asked between layers.
    module = install(monkeypatch, FakeCard(name="NVIDIA T4", uuid="GPU-11111111"), card)
    limits: list[int] = []
    said: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: reserved * MIB)
    monkeypatch.setattr(devices, "free_device_bytes", lambda device: 512 * MIB)
    monkeypatch.setattr(devices, "limit_device_bytes", lambda device, limit: limits.append(limit // MIB))
    settings = RunSettings(model="m", output=Path("o"), keep=4, vram_gib=2.0)
    over = MemoryWatch((settings.vram_bytes, None), torch.device("cuda:0"), said.append)
    assert limits == [2048 - context]

    def between_layers() -> set[str]:
        module.asked.clear()
        over.between_layers()
        return set(module.asked)

    late = (NOBODY + 1, 3072)
    card.compute.append(late)
    others = between_layers() - {"nvmlInit", "nvmlDeviceGetHandleByIndex"}
    assert others
    assert all("RunningProcesses" in name for name in others)
    assert said == [
        f"note: another process took memory on cuda:0 during this run: name unknown (pid {late[0]}), 3.00 GiB; "
        "512.00 MiB are left for this run."
    ]
    # CUDA itself counts too; where NVML does not show this process, the usual size of a context is taken.
    card.compute = [late]
    between_layers()
    assert limits == [2048 - context] * 2 + [2048 - USUAL_CONTEXT // MIB]
    # Where processes could not be read, all is asked for until they can.
    card.refuse = dict.fromkeys(
        ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"), real.NVML_ERROR_NO_PERMISSION
    )
    between_layers()
    card.refuse, card.compute = {}, [own]
    assert "nvmlDeviceGetMemoryInfo" in between_layers()
    assert limits[-1] == 2048 - context
    assert "name unknown" in over.holders()
    card.refuse = {"nvmlDeviceGetHandleByIndex": real.NVML_ERROR_GPU_IS_LOST}
    between_layers()
    assert over.holders() == ""


def test_the_card_may_be_used_up_to_the_cap_or_to_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_facts, "context_bytes", lambda device: 300 * MIB)
    monkeypatch.setattr(devices, "free_device_bytes", lambda device: 4096 * MIB)
    device = torch.device("cuda:0")
    for cap, left, words in (
        (2.0, 2048 - 300 - 256, "--vram-gib 2 leaves 1.46 GiB (CUDA itself: 300.00 MiB)"),
        (0.25, 0, "--vram-gib 0.25 leaves 0 B (CUDA itself: 300.00 MiB)"),
        (8.0, 4096 - 256, "only 3.75 GiB can be used on cuda:0"),
        (None, 4096 - 256, "only 3.75 GiB can be used on cuda:0"),
    ):
        settings = RunSettings(model="m", output=Path("o"), keep=4, vram_gib=cap)
        limit = memory_facts._gpu_limit(settings, device, 1)
        assert (limit.nbytes, limit.words) == (left * MIB, words)


CAPPED = """
import json, sys
from pathlib import Path
from streamprune.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
    status = 0
except SystemExit as error:
    status = error.code
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps({"status": status, "peak": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of resident memory")
@pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch's builds for GPUs take more than the cap by themselves"
)
def test_states_larger_than_what_the_cap_leaves_go_to_disk_and_the_run_stays_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11,264 tokens of 8,192 values in float32 are 352 MiB; of the 640 that there may be, libraries take over 400."""
    config = tiny_config(QWEN)
    config.hidden_size, config.num_hidden_layers = 8192, 2
    config.head_dim, config.num_experts, config.moe_intermediate_size, config.max_position_embeddings = 16, 4, 8, 1024
    source = make_model(tmp_path / "model", config, max_shard_size="1GB")
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=44, length=256)

    def words(states: str) -> list[str]:
        options = ["-o", tmp_path / states, "--keep", 3, "--calibration", ids, "--states", states, "--ram-gib", 0.625]
        return list(map(str, ["run", source, *options]))

    command = [sys.executable, "-c", CAPPED, *words("auto")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    completed, told = json.loads(done.stdout.splitlines()[-1]), done.stderr
    assert completed["status"] == 0, told
    assert (640 - 352) * MIB < completed["peak"] <= 640 * MIB
    assert "hidden states 352.00 MiB on disk" in told
    assert "note: resident memory" not in told
    assert json.loads((tmp_path / "auto" / "streamprune.json").read_text())["calibration"]["tokens"] == 11264

    # (This process has more libraries than such a run.)
    monkeypatch.setattr(machine, "resident_bytes", lambda: 400 * MIB)
    refused = call(*words("ram"))
    told = refused.stderr
    assert refused.exit_code == 1
    assert "hidden states of 11,264 calibration tokens (352.00 MiB)" in told
    assert "--ram-gib 0.625 leaves" in told
    assert "Use --states disk" in told
    assert "layer 0/1" not in told
    assert not (tmp_path / "ram").exists()
