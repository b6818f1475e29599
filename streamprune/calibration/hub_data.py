"""Rows of data sets on the Hugging Face Hub, streamed: nothing of them is kept on the disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

from streamprune.calibration.recipe import Source
from streamprune.calibration.sources import Row
from streamprune.checkpoint.hub import ANSWER_SECONDS, first_line
from streamprune.errors import CalibrationError

DEFAULT_SPLIT = "train"


def commits_of(sources: Iterable[Source]) -> dict[str, str]:
    """The commits that the revisions of all Hub data sets are now, by the names of their sources.

    Raises CalibrationError, naming the source, where the library for data sets is missing, and where a data set is
    gated, missing, or has no such revision.
    """
    datasets = [source for source in sources if source.dataset is not None]
    for source in datasets[:1]:
        if importlib.util.find_spec("datasets") is None:
            raise CalibrationError(
                f"Source {source.name!r} is the Hub data set {source.dataset}, which takes the `datasets` library: "
                "install it with `pip install 'streamprune[datasets]'`, or give files of your own with 'path'."
            )
    found = {}
    for source in datasets:
        try:
            commit = _commit(source)
        except Exception as error:
            # From several libraries, with no class in common.
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
        # Pictures and sound stay undecoded: only text is asked for.
        stream = stream.decode(False)
        if stream.num_shards > 1:
            # A buffer of one row: only the order of the shards is left to the library.
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
