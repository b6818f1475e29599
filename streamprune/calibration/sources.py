"""From a source to rows: records as they are in files, folders, data sets of the Hub and the built-in text.

Nothing in them is trusted. A file is read line by line, or a few rows at a time, and only as far as rows are asked for;
data sets are streamed, and nothing of them is kept on the disk.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from streamprune.calibration.builtin_text import BUILTIN, DOMAINS
from streamprune.calibration.recipe import Source, file_opened
from streamprune.checkpoint.hub import ANSWER_SECONDS, first_line
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json
from streamprune.hardware.memory import format_bytes

#: Limits of the shuffle buffer, in rows and in bytes as in the files. (Token ids and other numbers take about eight
#: times as much in memory.)
MOST_HELD_ROWS, MOST_HELD_BYTES = 10_000, 1 << 25
#: Longer texts are cut at line ends into documents of about this many bytes, so that a few large files do not have to
#: be tokenized as a whole for a small sample.
DOCUMENT_BYTES = 1 << 13
#: The longest line that is read. Parsed, it can take twenty times as much memory.
MOST_LINE_BYTES = 1 << 28
#: How many bytes at the start of a file decide whether it is text.
_SNIFFED_BYTES = 1 << 13
#: Rows of a parquet file that are decoded at a time. Few, since dictionary encoding can repeat one long text in each.
BATCH_ROWS = 16
#: Bytes of text, and numbers of columns and row groups, that a parquet file's description may claim.
_MOST_THRIFT_STRING, _MOST_THRIFT_ITEMS = 1 << 26, 1 << 20
#: Size of the shuffle buffer for built-in documents. The seed decides their order already, but pieces of one module
#: follow one another. Generating many more would take seconds.
_HELD_BUILTIN = 64
#: The libraries that shuffle take seeds below this.
_SEEDS = 2**32
DEFAULT_SPLIT = "train"


@dataclass
class Row:
    """One record: its fields by name, its file and line (`place`, for messages), and its approximate size."""

    place: str
    values: dict[str, Any] = field(repr=False)
    nbytes: int


def shuffled(rows: Iterator[Row], rng: random.Random, most_rows: int = MOST_HELD_ROWS) -> Iterator[tuple[int, Row]]:
    """Rows in a random order, each with its number in the original one.

    A shuffle buffer of at most `most_rows` rows and MOST_HELD_BYTES, so that a long source is not read to its end.
    """
    held: list[tuple[int, Row]] = []
    nbytes = 0
    for item in enumerate(rows):
        held.append(item)
        nbytes += item[1].nbytes
        while held and (len(held) > most_rows or nbytes > MOST_HELD_BYTES):
            place = rng.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            drawn = held.pop()
            nbytes -= drawn[1].nbytes
            yield drawn
    rng.shuffle(held)
    yield from held


def rows_of(source: Source, seed: int, commit: str | None) -> tuple[Iterator[tuple[int, Row]], list[Path]]:
    """A source's rows with their numbers, in the order in which they are used; and its files that are not text.

    `seed` counts if the source has none of its own, and `commit` is that of its data set. Raises CalibrationError where
    the source cannot be opened.
    """
    seed = (seed if source.seed is None else source.seed) % _SEEDS
    rng = random.Random(seed)
    if source.builtin is not None:
        return shuffled(_read_builtin(source.builtin, seed), rng, _HELD_BUILTIN), []
    if source.dataset is not None:
        return shuffled(open_dataset(source, seed, commit), rng), []
    found = [files_of(path) for path in source.paths]
    rows = read_files([path for taken, _ in found for path in taken], rng)
    return shuffled(rows, rng), [path for _, left_out in found for path in left_out]


def _read_builtin(domain: str, seed: int) -> Iterator[Row]:
    """The documents of a domain, in an order that the seed decides. Some never end."""
    for number, text in enumerate(DOMAINS[domain](seed)):
        yield Row(f"{BUILTIN}:{domain} document {number}", {"text": text}, len(text))


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that a path names: itself, or all files in a folder in order of their names; and those skipped.

    Hidden files and files that do not look like text are skipped. Raises CalibrationError if no file is left.
    """
    try:
        if not path.is_dir():
            with file_opened(path):
                return [path], []
        inside = [each for each in sorted(path.rglob("*")) if each.is_file()]
        inside = [each for each in inside if not any(part[0] == "." for part in each.relative_to(path).parts)]
        taken = [each for each in inside if each.suffix.lower() == ".parquet" or _looks_like_text(each)]
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None
    if not taken:
        what = f"none of the {len(inside)} files in it is text, JSONL or parquet"
        raise CalibrationError(f"{path} cannot be calibrated on: {what if inside else 'there is no file in it'}.")
    return taken, [each for each in inside if each not in set(taken)]


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as stream:
        data = stream.read(_SNIFFED_BYTES)
    try:
        # The last few bytes may be the first half of a character.
        data[:-4].decode("utf-8")
    except UnicodeDecodeError as error:
        return len(data) > _SNIFFED_BYTES - 4 and error.start >= len(data) - 8
    return b"\0" not in data and bool(data.strip())


def read_files(paths: list[Path], rng: random.Random) -> Iterator[Row]:
    """The rows of files, one file after the other in a random order (a long source is not read to its end)."""
    order = list(paths)
    rng.shuffle(order)
    for path in order:
        yield from read_file(path, rng)


def read_file(path: Path, rng: random.Random) -> Iterator[Row]:
    """The rows of a file, by its suffix. Raises CalibrationError, naming the file and the line."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from read_parquet(path, rng)
        return
    with file_opened(path) as stream:
        is_jsonl = suffix in {".jsonl", ".ndjson"} or (suffix == ".json" and _begins_with_record(stream))
        yield from _read_jsonl(path, stream) if is_jsonl else _read_text(path, stream)


def _begins_with_record(stream: BinaryIO) -> bool:
    """Whether the first line is a JSON object by itself: many `.json` files are JSONL."""
    line = stream.readline(MOST_LINE_BYTES)
    stream.seek(0)
    try:
        return isinstance(parse_json(line), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path: Path, rng: random.Random) -> Iterator[Row]:
    """The rows of a parquet file, its row groups in a random order. Raises CalibrationError, naming the file."""
    # Imported where it is needed: it takes a second and 50 MiB.
    import pyarrow.parquet

    limits = {"thrift_string_size_limit": _MOST_THRIFT_STRING, "thrift_container_size_limit": _MOST_THRIFT_ITEMS}
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, **limits) as file:
            groups = list(range(file.num_row_groups))
            rng.shuffle(groups)
            for group in groups:
                numbers = count(1)
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                    nbytes = batch.nbytes // max(1, batch.num_rows)
                    for values in batch.to_pylist():
                        yield Row(f"{path} row {next(numbers)} of row group {group + 1}", values, nbytes)
    except FileNotFoundError:
        raise CalibrationError(f"There is no calibration file {path}.") from None
    except Exception as error:
        # Damaged files fail as one of Arrow's errors, as an OSError, as a ValueError, or for lack of memory.
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise CalibrationError(f"{path} cannot be read as a parquet file: {reason}. Download it again.") from None


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Row]:
    position = number = 0
    while data := stream.read(DOCUMENT_BYTES):
        data += _line(stream, f"{path}, the line after byte {position + len(data):,},")
        try:
            # With line ends as in Python's text mode.
            text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise _not_text(str(path), position + error.start) from None
        position += len(data)
        if text.strip():
            number += 1
            yield Row(f"{path} (part {number})", {"text": text}, len(data))


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Row]:
    position = 0
    for number in count(1):
        place = f"{path} line {number}"
        line = _line(stream, place)
        if not line:
            return
        if line.strip():
            yield Row(place, _record_of(line, place, position), len(line))
        position += len(line)


def _record_of(line: bytes, place: str, position: int) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        raise _not_text(place, position + error.start) from None
    except (ValueError, RecursionError) as error:
        reason = str(error)[:300]
        raise CalibrationError(f"{place} is not valid JSON: {reason}. Fix or remove the line.") from None
    if not isinstance(record, dict):
        raise CalibrationError(f"{place} holds a JSON {type(record).__name__}, not an object with 'text'.")
    return record


def _line(stream: BinaryIO, place: str) -> bytes:
    data = stream.readline(MOST_LINE_BYTES + 1)
    if len(data) > MOST_LINE_BYTES:
        raise CalibrationError(
            f"{place} is longer than {format_bytes(MOST_LINE_BYTES)}, the limit. Split it into several lines."
        )
    return data


def _not_text(place: str, position: int) -> CalibrationError:
    return CalibrationError(f"{place} is not UTF-8 text (byte {position:,}). Give plain text, JSONL or parquet.")


def commits_of(sources: Iterable[Source]) -> dict[str, str]:
    """The commits to which the revisions of all Hub data sets resolve now, by source name.

    Raises CalibrationError, naming the source, if the `datasets` library is missing, or if a data set is gated,
    missing, or has no such revision.
    """
    datasets = [source for source in sources if source.dataset is not None]
    for source in datasets[:1]:
        if importlib.util.find_spec("datasets") is None:
            raise CalibrationError(
                f"Source {source.name!r} is the Hub data set {source.dataset}, which needs the `datasets` library: "
                "install it with `pip install 'streamprune[datasets]'`, or give files of your own with 'path'."
            )
    found = {}
    for source in datasets:
        try:
            commit = _commit(source)
        except Exception as error:
            # Errors come from several libraries, with no common class.
            raise _explained(source, error) from None
        if commit is not None:
            found[source.name] = commit
    return found


def open_dataset(source: Source, seed: int, commit: str | None) -> Iterator[Row]:
    """The rows of a source's data set at a commit, its shards in an order that the seed decides.

    Raises CalibrationError, naming the source, where the data set has no such subset or split.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        stream = load_stream(source, commit)
        if not isinstance(stream, datasets.IterableDataset):
            raise ValueError(f"{source.split or DEFAULT_SPLIT!r} is not a single split")
        # Only text is used, so images and audio stay undecoded.
        stream = stream.decode(False)
        if stream.num_shards > 1:
            # A buffer of one row: the library only shuffles the order of the shards.
            stream = stream.shuffle(seed=seed, buffer_size=1)
    except Exception as error:
        raise _explained(source, error) from None
    return _rows(source, stream)


def load_stream(source: Source, commit: str | None) -> Any:
    """A source's data set as the `datasets` library streams it."""
    import datasets

    return datasets.load_dataset(
        source.dataset,
        source.subset,
        split=source.split or DEFAULT_SPLIT,
        revision=commit,
        data_files=source.data_files,
        data_dir=source.data_dir,
        streaming=True,
    )


def _commit(source: Source) -> str | None:
    """Raises what the Hub library raises, also for gated data sets."""
    from huggingface_hub import HfApi

    hub = HfApi()
    assert source.dataset is not None
    hub.auth_check(source.dataset, repo_type="dataset")
    return hub.dataset_info(source.dataset, revision=source.revision, timeout=ANSWER_SECONDS).sha


def _rows(source: Source, stream: Any) -> Iterator[Row]:
    try:
        for number, values in enumerate(stream, 1):
            yield Row(f"source {source.name!r} ({source.dataset}) record {number}", values, _size(values))
    except Exception as error:
        raise _explained(source, error) from None


def _size(value: Any) -> int:
    """About how many bytes a record takes."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values())) + 64
    return sum(map(_size, value)) + 64 if isinstance(value, list) else 16


def _explained(source: Source, error: Exception) -> CalibrationError:
    """What went wrong with a data set, and what to do."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    what = f"Source {source.name!r}: the Hub data set {source.dataset}"
    page = f"{HfApi().endpoint}/datasets/{source.dataset}"
    login = "log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, hub_errors.GatedRepoError):
        return CalibrationError(f"{what} is gated. Ask for access at {page}, then {login}")
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return CalibrationError(f"{what} has no branch, tag or commit {source.revision!r}. Choose another 'revision'.")
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return CalibrationError(f"{what} does not exist, or is private. Check the name; if it is private, {login}")
    subset = "" if source.subset is None else f"subset {source.subset!r}, "
    reason = first_line(str(error)) or type(error).__name__
    advice = f"Check the recipe against {page}, and the connection."
    if "scripts are no longer supported" in reason:
        advice = "The Hub may have a copy without the script: try with 'revision: refs/convert/parquet'."
    chosen = f"{subset}split {source.split or DEFAULT_SPLIT!r}"
    return CalibrationError(f"{what} ({chosen}) cannot be read: {reason}. {advice}")
