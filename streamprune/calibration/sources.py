"""From a source to rows: records as they are in files, folders, data sets of the Hub and the built-in text.

Nothing in them is trusted. They are read only as far as rows are asked for; data sets are streamed, and nothing of them
is kept on the disk.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable, Iterator
from typing import Any

from streamprune.calibration.builtin_text import BUILTIN, DOMAINS
from streamprune.calibration.left_out import LeftOut
from streamprune.calibration.recipe import Source
from streamprune.calibration.rows import Row
from streamprune.calibration.text_files import read_files
from streamprune.checkpoint.hub import ANSWER_SECONDS, first_line
from streamprune.errors import CalibrationError

#: Limits of the shuffle buffer, in rows and in bytes as in the files. (Token ids and other numbers take about eight
#: times as much in memory.)
MOST_HELD_ROWS, MOST_HELD_BYTES = 10_000, 1 << 25
#: Size of the shuffle buffer for built-in documents. The seed decides their order already, but pieces of one module
#: follow one another. Generating many more would take seconds.
_HELD_BUILTIN = 64
#: The libraries that shuffle take seeds below this.
_SEEDS = 2**32
DEFAULT_SPLIT = "train"


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


def rows_of(source: Source, seed: int, commit: str | None, left_out: LeftOut) -> Iterator[tuple[int, Row]]:
    """A source's rows with their numbers, in the order in which they are used.

    `seed` counts if the source has none of its own, and `commit` is that of its data set. Files that are not text are
    noted in `left_out`. Raises CalibrationError where the source cannot be opened.
    """
    seed = (seed if source.seed is None else source.seed) % _SEEDS
    rng = random.Random(seed)
    if source.builtin is not None:
        return shuffled(_read_builtin(source.builtin, seed), rng, _HELD_BUILTIN)
    if source.dataset is not None:
        return shuffled(open_dataset(source, seed, commit), rng)
    return shuffled(read_files(source, rng, left_out), rng)


def _read_builtin(domain: str, seed: int) -> Iterator[Row]:
    """The documents of a domain, in an order that the seed decides. Some never end."""
    for number, text in enumerate(DOMAINS[domain](seed)):
        yield Row(f"{BUILTIN}:{domain} document {number}", {"text": text}, len(text))


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
