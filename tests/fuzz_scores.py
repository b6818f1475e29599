"""What is fuzzed of scores and choices: the file of scores, and the lists and texts that say which experts stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from streamprune.models.config_json import ExpertSpec
from streamprune.saliency.scores_file import read_scores, write_scores
from streamprune.selection.compare import changed_settings
from streamprune.selection.settings import SelectionSettings, mix_weights
from streamprune.selection.user_files import read_keep_file, read_schedule_file
from tests.fuzz_targets import Target
from tests.fuzzing import NUMBERS, STRANGE, Tally, as_json, judge, judge_command, mutated_bytes, mutated_json
from tests.made_scores import make_scores

SPEC = ExpertSpec((), "num_experts", 8, 2)
GROUPED = ExpertSpec((), "n_routed_experts", 8, 2, groups=2, topk_groups=1)
BLOCKS = (0, 3)
KEPT = {"layers": [{"index": 0, "kept": [1, 2, 5, 6]}, {"index": 3, "kept": [0, 3, 5, 7]}], "0": [1, 2], "3": [5, 6]}
#: Pieces of mixes and of comparisons, and what may come between them.
PIECES = st.one_of(
    st.text(max_size=6),
    NUMBERS.map(str),
    st.sampled_from(
        ["source0", "source1", "=", "=", ",", ";", "mix=", "method=ean", "seed=", "schedule=global", "0.5"]
    ),
)


def score_targets(folder: Path) -> list[Target]:
    """The targets of this file, with what they need made in `folder`."""
    return [*_files(folder), *_lists(folder), *_texts()]


def _files(folder: Path) -> list[Target]:
    path = folder / "scores.safetensors"
    write_scores(path, make_scores(layers=(0, 3), experts=6, per_source=(9, 9)))
    valid = path.read_bytes()
    length = int.from_bytes(valid[:8], "little")
    header, rest = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    # The metadata hold JSON as text: it is made strange inside, too.
    inner = {name: json.loads(text) for name, text in header["__metadata__"].items() if text[:1] in "[{"}

    def with_inner(strange: dict[str, Any]) -> bytes:
        texts = {name: as_json(value).decode() for name, value in strange.items()} if isinstance(strange, dict) else {}
        return _file({**header, "__metadata__": {**header["__metadata__"], **texts}}, rest)

    tally_file = _target(
        "scores, headers",
        mutated_json(header).map(lambda value: _file(value, rest)) | mutated_json(inner).map(with_inner),
        lambda tally, content: _read(tally, path, content),
    )
    tally_bytes = _target("scores, bytes", mutated_bytes(valid), lambda tally, content: _read(tally, path, content))

    def show(tally: Tally, content: bytes) -> None:
        path.write_bytes(content)
        # A router may have been made of which the choice is refused, without a word about the file.
        judge_command(tally, None, "inspect", str(path), "--keep", "3", "--compare", "method=ean")

    shown = mutated_json(inner).map(with_inner) | st.binary(max_size=64).map(
        lambda tail: valid[: -len(tail) or None] + tail
    )
    return [tally_file, tally_bytes, _target("inspect", shown, show, 0.4)]


def _file(header: Any, rest: bytes) -> bytes:
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + rest


def _read(tally: Tally, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    judge(tally, "scores.safetensors", lambda: read_scores(path))


def _lists(folder: Path) -> list[Target]:
    path = folder / "list.json"

    def keep(tally: Tally, content: bytes) -> None:
        path.write_bytes(content)
        for spec in (SPEC, GROUPED):
            judge(tally, "list.json", lambda spec=spec: read_keep_file(path, spec, BLOCKS))  # type: ignore[misc]

    def schedule(tally: Tally, content: bytes) -> None:
        path.write_bytes(content)
        for spec in (SPEC, GROUPED):
            judge(tally, "list.json", lambda spec=spec: read_schedule_file(path, spec, 2))  # type: ignore[misc]

    by_layer = {name: KEPT[name] for name in ("0", "3")}
    kept = st.one_of(*(mutated_json(body) for body in (KEPT, by_layer, list(by_layer.values()))), STRANGE)
    counts = st.lists(NUMBERS, min_size=1, max_size=3) | mutated_json([4, 6]) | mutated_json([0.25, 0.5])
    return [
        _target("keep file", kept.map(as_json) | mutated_bytes(as_json(by_layer)), keep),
        _target("schedule file", counts.map(as_json) | mutated_bytes(b"[4, 6]"), schedule),
    ]


def _texts() -> list[Target]:
    entry = st.tuples(st.sampled_from(["source0", "source1"]), NUMBERS).map(lambda pair: f"{pair[0]}={pair[1]}")
    near = st.lists(entry, min_size=1, max_size=3).map(",".join)
    text = near | st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=30)

    def mix(tally: Tally, content: str) -> None:
        judge(tally, "--mix", lambda: mix_weights(content, ("source0", "source1"), (9, 2**50)))

    def compare(tally: Tally, content: str) -> None:
        judge(tally, None, lambda: changed_settings(SelectionSettings(), content))

    return [_target("mix", text, mix), _target("comparison", text | near.map("mix={}".format), compare)]


def _target(name: str, inputs: st.SearchStrategy[Any], check: Any, share: float = 1) -> Target:
    target = Target(name, inputs, lambda _: None, share)
    target.check = lambda value: check(target.tally, value)
    return target
