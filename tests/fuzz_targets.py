"""What is fuzzed: every place where the program reads what others may have written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamprune.calibration.sequences import load_calibration
from streamprune.checkpoint.index import INDEX_NAME, open_checkpoint, read_json
from streamprune.common_settings import Sampling
from streamprune.config import RunSettings
from streamprune.files.durable import read_record
from streamprune.models.config_json import stated_experts, stated_shape, states_experts, text_part
from streamprune.models.open import load_config
from streamprune.models.skeleton import expert_candidates
from streamprune.output.verify import verify
from streamprune.pipeline.resume import check_same, read_calibration
from streamprune.pipeline.run import resume
from streamprune.pipeline.status import status_of, status_text
from streamprune.work.folder import WorkFolder
from streamprune.work.records import RecordedRun, read_run
from streamprune.work.saved_states import open_states
from tests.fuzz_recipes import RECIPE_NAME, parquet_files, recipes, write_records
from tests.fuzzing import STRANGE, Tally, as_json, judge, judge_command, mutated_bytes, mutated_json
from tests.helpers import prepare_whole, prune
from tests.shards import DATA, GOOD, METADATA, shard, single, two_shards
from tests.tiny import FAMILIES, VOCAB, make_model, tiny_config, write_token_ids
from tests.tokenizer import save_tokenizer

INDEX = {
    "metadata": {"total_size": 53},
    "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
}
JSONL = [
    {"input_ids": [3, 4, 5, 250, 9, 9]},
    {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "nothing at all"}]},
    {"text": "some text of a few words, größer als nichts"},
]


class Stopped(Exception):
    """Ends a run on its way, as a fault would."""


class Place:
    """Valid things in one folder: a model, a pruned one, and the work folder of a run that was cut off."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model", tiny_config(FAMILIES[0]), max_shard_size="1GB")
        save_tokenizer(self.model)
        self.config = json.loads((self.model / "config.json").read_text())
        self.ids = write_token_ids(folder / "ids.jsonl")
        self.pruned = prune(self.model, folder / "pruned").output
        self.report = json.loads((self.pruned / "streamprune.json").read_text())
        self.work = self._half_done()
        self.records = {
            str(path.relative_to(self.work)): read_record(path) for path in sorted(self.work.rglob("*.json"))
        }
        assert {"run.json", "tokens.json", "cursor.json", "layers/00001.json"} <= self.records.keys()

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name

    def work_with(self, name: str, body: Any) -> Path:
        """A copy of the work folder with another record in it, its checksum valid, beside no output."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        shutil.rmtree(self.folder / "out.work", ignore_errors=True)
        # Links are enough, and quick: nothing in a work folder is changed in place.
        shutil.copytree(self.work, self.folder / "out.work", copy_function=os.link)
        for each in {name, name.replace("run.json", "run.copy.json").replace("tokens.json", "tokens.copy.json")}:
            write_signed(self.folder / "out.work" / each, body)
        return self.folder / "out.work"

    def config_folder(self, config: bytes, weights: bool) -> Path:
        folder = self.fresh("config")
        (folder / "config.json").write_bytes(config)
        if weights:
            (folder / "model.safetensors").symlink_to(self.model / "model.safetensors")
        return folder

    def _half_done(self) -> Path:
        seen = []

        def stop(point: str) -> None:
            seen.append(point)
            if seen.count("cursor moved") == 3:
                raise Stopped

        try:
            with patch("streamprune.work.saved_states.kill_point", stop):
                prune(self.model, self.folder / "out", calibration=(str(self.ids),), checkpoint_every=0.0)
        except Stopped:
            return (self.folder / "out.work").rename(self.folder / "half")
        raise AssertionError("the run was not stopped")


def write_signed(path: Path, body: Any) -> None:
    """A record as `durable.write_record` would write it, of anything at all."""
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stated = {"sha256": hashlib.sha256(text).hexdigest(), "body": body}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(stated))


@dataclass
class Target:
    """One thing to fuzz. `check` puts an input in its place and judges what comes of it.

    `share` is how many inputs it gets, of those of a fast target.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    share: float = 1.0
    tally: Tally = field(default_factory=Tally)

    def run(self, examples: int, seed: int | None = None) -> Tally:
        """Give it so many inputs; raises what any of them raised, with the least such input."""
        usual = settings(
            max_examples=max(1, round(examples * self.share)), deadline=None, database=None, derandomize=seed is None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        body = usual(given(self.inputs)(self.check))
        if seed is not None:
            from hypothesis import seed as seeded

            body = seeded(seed)(body)
        body()
        return self.tally


def targets(folder: Path) -> list[Target]:
    """All targets, with what they need made in `folder`."""
    place = Place(folder)
    return [*_files(place), *_configs(place), *_journal(place), *_calibration(place), _report(place)]


def _target(name: str, inputs: st.SearchStrategy[Any], check: Callable[[Tally, Any], None], share: float = 1) -> Target:
    target = Target(name, inputs, lambda _: None, share)
    target.check = lambda value: check(target.tally, value)
    return target


def _files(place: Place) -> list[Target]:
    def header(tally: Tally, content: bytes) -> None:
        folder = single(place.folder / "single", content)
        judge(tally, "model.safetensors", lambda: open_checkpoint(folder).fingerprint())

    def index(tally: Tally, content: bytes) -> None:
        folder = two_shards(place.folder / "two")
        (folder / INDEX_NAME).write_bytes(content)
        judge(tally, str(folder), lambda: open_checkpoint(folder))

    honest = mutated_json(METADATA | GOOD).map(lambda value: shard(as_json(value), DATA))
    lying = st.tuples(mutated_json(GOOD), st.integers(0, 2**64 - 1)).map(
        lambda pair: shard(as_json(pair[0]), DATA, pair[1])
    )
    return [
        _target("safetensors headers", st.one_of(honest, lying, mutated_bytes(shard(METADATA | GOOD))), header, 2),
        _target("index", st.one_of(mutated_json(INDEX).map(as_json), mutated_bytes(as_json(INDEX))), index, 2),
    ]


def _configs(place: Place) -> list[Target]:
    def facts(folder: Path) -> None:
        raw = read_json(folder / "config.json")
        text_part(raw), stated_experts(raw), states_experts(raw), stated_shape(raw)

    def model(folder: Path) -> None:
        config = load_config(folder)
        list(expert_candidates(config))

    def plain(tally: Tally, content: bytes) -> None:
        folder = place.config_folder(content, weights=False)
        judge(tally, str(folder), lambda: facts(folder))

    def classes(tally: Tally, content: bytes) -> None:
        folder = place.config_folder(content, weights=False)
        judge(tally, None, lambda: model(folder))

    def fit(tally: Tally, content: tuple[bytes, bool]) -> None:
        folder = place.config_folder(*content)
        judge_command(tally, None, "fit", str(folder), "--budget-gib", "24")

    def front(tally: Tally, content: bytes) -> None:
        folder = place.config_folder(content, weights=True)
        judge(tally, None, lambda: prepare_whole(RunSettings(model=str(folder), output=place.folder / "none", keep=5)))

    config = mutated_json(place.config)
    anything = st.one_of(config.map(as_json), mutated_bytes(as_json(place.config)))
    return [
        _target("config.json as JSON", anything, plain, 2),
        _target("config.json as a model's config", config.map(as_json), classes),
        _target("fit", st.tuples(anything, st.booleans()), fit, 0.4),
        _target("run up to its plan", config.map(as_json), front, 0.4),
    ]


def _journal(place: Place) -> list[Target]:
    now = msgspec.convert(place.records["run.json"], RecordedRun)
    bodies = st.sampled_from(sorted(place.records)).flatmap(
        lambda name: st.tuples(st.just(name), mutated_json(place.records[name]) | STRANGE)
    )
    first = (place.work / "run.json").read_bytes()

    def damaged(tally: Tally, content: bytes) -> None:
        path = place.folder / "record.json"
        path.write_bytes(content)
        judge(tally, None, lambda: read_record(path))

    def states(tally: Tally, body: Any) -> None:
        work = place.work_with(index_name, body)
        judge(tally, None, lambda: _load_all(work / Path(index_name).parent))

    def read(tally: Tally, record: tuple[str, Any]) -> None:
        work = place.work_with(*record)
        judge(tally, str(work), lambda: _read_journal(work, now))

    def go_on(tally: Tally, record: tuple[str, Any]) -> None:
        work = place.work_with(*record)
        judge(tally, None, lambda: resume(work, quiet=True, device="cpu"))

    index_name = max(name for name in place.records if name.startswith("states/"))
    return [
        _target("damaged records", mutated_bytes(first), damaged, 2),
        _target("index of saved states", mutated_json(place.records[index_name]), states),
        _target("journal, read", bodies, read),
        _target("journal, resumed", bodies, go_on, 0.1),
    ]


def _load_all(folder: Path) -> None:
    saved = open_states(folder)
    for number in range(len(saved) if saved is not None else 0):
        assert saved is not None
        # With such an error a run says that it cannot use these states, and goes back to older ones.
        with suppress(ValueError):
            saved.load(number)


def _read_journal(folder: Path, now: RecordedRun) -> None:
    status_text(status_of(folder))
    work = WorkFolder(folder)
    for block in (None, *range(4)):
        work.read_layer(block)
    list(work.states.intact()), work.states.layer()
    recorded = read_run(folder)
    if recorded is not None:
        recorded.settings_in(folder)
        check_same(recorded, now, folder)
        read_calibration(recorded, folder, VOCAB)


def _calibration(place: Place) -> list[Target]:
    def load(tally: Tally, name: str, content: bytes) -> None:
        path = place.folder / name
        path.write_bytes(content)
        # A recipe's own numbers are to count, and its messages name its sources.
        is_recipe = name == RECIPE_NAME
        given = Sampling() if is_recipe else Sampling(samples=4, seq_len=8)
        judge(tally, None if is_recipe else name, lambda: load_calibration([str(path)], place.model, given, **limits))

    limits: dict[str, Any] = {"vocab_size": VOCAB, "max_positions": 256}
    write_records(place.folder)
    lines = b"".join(as_json(record) + b"\n" for record in JSONL)
    records = st.lists(mutated_json(JSONL[0]) | mutated_json(JSONL[1]) | mutated_json(JSONL[2]), min_size=1, max_size=3)
    jsonl = records.map(lambda values: b"\n".join(map(as_json, values))) | mutated_bytes(lines)
    text = (
        st.binary(max_size=200)
        | mutated_bytes("Größe, 大きさ, قياس\r\n".encode() * 9)
        | st.text().map(lambda value: value.encode("utf-16", "surrogatepass"))
    )
    return [
        _target("calibration, JSONL", jsonl, lambda tally, content: load(tally, "lines.jsonl", content), 0.4),
        _target("calibration, text", text, lambda tally, content: load(tally, "text.txt", content), 0.4),
        _target("calibration, parquet", parquet_files(), lambda tally, content: load(tally, "a.parquet", content), 0.4),
        _target("calibration, recipe", recipes(), lambda tally, content: load(tally, RECIPE_NAME, content), 0.4),
    ]


def _report(place: Place) -> Target:
    def prove(tally: Tally, content: bytes) -> None:
        (place.pruned / "streamprune.json").write_bytes(content)
        judge(tally, str(place.pruned), lambda: verify(place.pruned, place.model))

    # What it says of settings and scores is not looked at; the layers are.
    short = {"layers": place.report["layers"]}
    reports = mutated_json(short).map(as_json) | mutated_bytes(as_json(short))
    return _target("streamprune.json, verified", reports, prove, 0.2)
