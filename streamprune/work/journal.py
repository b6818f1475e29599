"""What may stand in the records of a work folder. A whole record need not be ours: a checksum is no signature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamprune.errors import ResumeError
from streamprune.source.config_facts import MOST_BLOCKS
from streamprune.source.shard import show

#: The format in which runs are recorded.
RUN_FORMAT = 2
#: Bytes that a record may have at most: of tokens, of saved states, and of anything else.
MOST_TOKENS_BYTES, MOST_INDEX_BYTES, MOST_RECORD_BYTES = 2**30, 2**27, 2**24


def checked_run(path: Path, body: Any) -> dict[str, Any]:
    """The record of a run that was read from `path`.

    Raises ResumeError for one that this version did not write: whatever others read from it is of the right kind.
    """
    stated = body.get("format") if isinstance(body, dict) else None
    if type(stated) is not int or stated != RUN_FORMAT:
        raise ResumeError(
            f"{path} was recorded in format {show(stated)}; this version of streamprune reads {RUN_FORMAT}. Use the "
            "version that began the run, or begin anew with --resume never."
        )
    wrong = next((name for name, is_right in _RUN_PARTS.items() if not is_right(body.get(name))), None)
    if wrong is not None:
        raise ResumeError(
            f"{path} was made or changed by something else: its {wrong!r} is {show(body.get(wrong))}. Begin anew with "
            "--resume never."
        )
    known: dict[str, Any] = body
    return known


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on that any machine can hold."""
    return type(value) is int and 0 <= value < 2**63


def is_block(body: Any) -> bool:
    """Whether this can be the record of a finished block: its result (None without experts) and its shards."""
    return (
        isinstance(body, dict)
        and "result" in body
        and (body["result"] is None or isinstance(body["result"], dict))
        and isinstance(body.get("kept"), list)
        and all(map(is_count, body["kept"]))
        and isinstance(body.get("shards"), list)
        and all(map(_is_shard, body["shards"]))
    )


def is_evaluation(body: Any) -> bool:
    """Whether this can be the record of an evaluation: sources with numbers, and all of them together."""
    if (
        not isinstance(body, dict)
        or not isinstance(body.get("data"), dict)
        or not isinstance(body.get("sources"), list)
        or not isinstance(body.get("against"), str)
    ):
        return False
    return all(map(_are_figures, [*body["sources"], body.get("all")]))


def _are_figures(value: Any) -> bool:
    """Whether these can be the figures of a source, compared with an original's."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not is_count(value.get("tokens")):
        return False
    numbers = [value.get(name) for name in ("loss", "perplexity", "original_loss", "kl", "kl_p99", "top1_agreement")]
    intervals = [value.get(f"{name}_interval", ()) for name in ("loss", "kl")]
    for ends in intervals:
        numbers += ends if isinstance(ends, list) and len(ends) == 2 else [0.0 if ends is None else None]
    return all(type(number) is float for number in numbers)


def is_cursor(body: Any) -> bool:
    """Whether this can be the cursor: it names the newest generation of states and perhaps the one before."""
    numbers = body.get("generations") if isinstance(body, dict) else None
    return isinstance(numbers, list) and len(numbers) <= 2 and all(map(is_count, numbers))


def is_pruning(body: Any) -> bool:
    """Whether this can be the record of a pruning: its command, the model's blocks, and what was decided."""
    return (
        isinstance(body, dict)
        and _is_command(body.get("command"))
        and is_count(body.get("blocks"))
        and 1 <= body["blocks"] <= MOST_BLOCKS
        and isinstance(body.get("decided"), dict)
    )


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"file", "nbytes", "sha256"}
        and isinstance(value["file"], str)
        and is_count(value["nbytes"])
        and isinstance(value["sha256"], str)
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_command(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) and "\0" not in value[name] for name in ("model", "output")
    )


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(facts, list) and len(facts) == 2 and all(map(is_count, facts)) for facts in value.values()
    )


def _is_calibration(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("fingerprint"), str)
        and is_count(value.get("sequences"))
        and is_count(value.get("tokens"))
        and _are_texts(value.get("sources"))
        and isinstance(value.get("source_of"), list)
        and all(map(is_count, value["source_of"]))
        and isinstance(value.get("recipe"), dict)
        and _are_texts(value.get("notes"))
    )


#: What a record of a run consists of, and how each part has to look.
_RUN_PARTS: dict[str, Callable[[Any], bool]] = {
    "command": _is_command,
    "settings": lambda value: isinstance(value, dict),
    "source": lambda value: isinstance(value, str),
    "files": _are_files,
    "calibration": _is_calibration,
    "versions": lambda value: isinstance(value, dict),
    "blocks": lambda value: is_count(value) and 1 <= value <= MOST_BLOCKS,
    "budget_bytes": lambda value: value is None or is_count(value),
    "batch_tokens": lambda value: is_count(value) and value >= 1,
}
