"""From MODEL to a local folder: a path stays a path, a Hub id is downloaded.

The headers of a model's safetensors files on the Hub, read by range requests: kilobytes instead of the weights.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from streamprune.checkpoint.index import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_SUFFIXES,
    SINGLE_NAME,
    index_notes,
    is_small_file,
    read_index,
)
from streamprune.checkpoint.safetensors_file import TensorEntry, header_entries
from streamprune.errors import CheckpointError, SettingsError
from streamprune.files.kinds import describe

#: How long the Hub may take for its first response. The Hub library itself has no timeout there.
ANSWER_SECONDS = 30.0


def resolve_model(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    config_only: bool = False,
    tokenizer_only: bool = False,
) -> Path:
    """The local folder for `model`: a folder path, or a Hub id, whose needed files are downloaded to the Hub cache.

    With `config_only` only the config is fetched, so that an unsupported model costs no download of weights; with
    `tokenizer_only` also the other small files, among them the tokenizer's. Only safetensors named by the index and
    small files are fetched; Python files only with `trust_remote_code`. With HF_HUB_OFFLINE=1 the copy in the cache is
    used, and the Hub is not contacted. Raises CheckpointError if the model cannot be found or reached, or has no
    safetensors weights, and SettingsError for a revision of a local folder.
    """
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        # No permission, a name too long for the file system, or the home of a user who does not exist.
        raise CheckpointError(f"{model!r} cannot be opened: {getattr(error, 'strerror', None) or error}.") from None
    if is_folder:
        if revision is not None:
            raise SettingsError(f"--revision {revision} is for models from the Hub, but {model} is a local folder.")
        return path
    if is_file:
        raise CheckpointError(
            f"{model} {describe(path)}. Give the folder that holds config.json and the *.safetensors files."
        )
    if _is_meant_as_path(model):
        raise CheckpointError(f"No folder {model!r} here. Give a local model folder or a Hub id such as org/name.")

    # Imported here, since a local folder does not need the library, which takes time to import.
    from huggingface_hub import is_offline_mode

    with explain_hub_errors(model, revision):
        if is_offline_mode():
            return _from_cache(model, revision, trust_remote_code, tokenizer_only)
        return _download(model, revision, trust_remote_code, config_only, tokenizer_only)


def _is_meant_as_path(model: str) -> bool:
    """Whether MODEL, which is not here, can only have been meant as a path: Hub ids are `name` or `org/name`."""
    odd = model.count("/") > 1 or model.endswith("/") or "\\" in model or not model.strip()
    return odd or model.startswith((".", "/", "~")) or model.lower().endswith((".gguf", ".safetensors", ".json"))


def _download(
    repo_id: str, revision: str | None, trust_remote_code: bool, config_only: bool, tokenizer_only: bool
) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(repo_id, revision=revision, timeout=ANSWER_SECONDS)
    names = [sibling.rfilename for sibling in info.siblings or []]
    weights = [SINGLE_NAME]
    # If there are both, the single file is used, as in `open_checkpoint`.
    if SINGLE_NAME not in names:
        if INDEX_NAME not in names:
            raise CheckpointError(f"{repo_id} has {_other_weights(names)}. Choose a safetensors version of the model.")
        weights = sorted(set(read_index(Path(hf_hub_download(repo_id, INDEX_NAME, revision=info.sha))).values()))
    needed = [CONFIG_NAME, *weights]
    missing = [name for name in needed if name not in names]
    if missing:
        raise CheckpointError(
            f"{repo_id} is incomplete on the Hub: {len(missing)} of {len(needed)} files are missing, first "
            f"{missing[0]!r}. Choose another --revision or another copy of the model."
        )
    if config_only:
        wanted = [name for name in names if name == CONFIG_NAME or (trust_remote_code and name.endswith(".py"))]
    else:
        wanted = _wanted(names, weights, trust_remote_code, tokenizer_only)
    if SINGLE_NAME in names and INDEX_NAME in names and not config_only:
        # Not read, but `open_checkpoint` then says so.
        wanted.append(INDEX_NAME)
    # Fetched by the branch's name, so that the cache records its commit for offline runs.
    patterns = [glob.escape(name) for name in wanted]
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    if folder.name != info.sha:
        raise CheckpointError(
            f"{repo_id} changed on the Hub during the download, from commit {info.sha} to {folder.name}. "
            "Run the same command again."
        )
    # If the Hub fails during the download, the library returns an incomplete copy.
    _check_complete(repo_id, folder, wanted)
    return folder


def _from_cache(repo_id: str, revision: str | None, trust_remote_code: bool, tokenizer_only: bool) -> Path:
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        # Only the config: other files of the repository may never have been downloaded.
        path = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[CONFIG_NAME])
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo_id} (revision {revision or 'main'}) is not in the Hub cache, and HF_HUB_OFFLINE=1 forbids "
            "downloading it. Unset HF_HUB_OFFLINE, or give a local folder."
        ) from None
    folder = Path(path)
    try:
        names = [entry.path for entry in get_cached_repo_tree(repo_id, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        # Cached by an older library or another tool; `open_checkpoint` still finds missing weights.
        return folder
    sharded = SINGLE_NAME not in names and (folder / INDEX_NAME).is_file()
    weights = sorted(set(read_index(folder / INDEX_NAME).values())) if sharded else [SINGLE_NAME]
    _check_complete(repo_id, folder, _wanted(names, weights, trust_remote_code, tokenizer_only))
    return folder


def cached_model(repo_id: str, revision: str | None = None, trust_remote_code: bool = False) -> Path | None:
    """The complete copy of a Hub model in the cache; None if there is none. The Hub is not contacted."""
    try:
        with explain_hub_errors(repo_id, revision):
            return _from_cache(repo_id, revision, trust_remote_code, tokenizer_only=False)
    except CheckpointError:
        return None


def _wanted(names: list[str], weights: list[str], trust_remote_code: bool, tokenizer_only: bool) -> list[str]:
    """The files of a repository that a run needs; code only if it is trusted."""
    # The README states the licence, which the new model card needs.
    wanted = {CONFIG_NAME, "README.md", *weights, *([] if weights == [SINGLE_NAME] else [INDEX_NAME])}
    if tokenizer_only:
        wanted -= set(weights)
    return [
        name
        for name in names
        if (name in wanted or is_small_file(name)) and (trust_remote_code or not name.endswith(".py"))
    ]


def _check_complete(repo_id: str, folder: Path, wanted: list[str]) -> None:
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"The copy of {repo_id} in the Hub cache is incomplete: {len(missing)} of {len(wanted)} files are missing, "
            f"first {missing[0]!r}. Run the same command again, with a connection and without HF_HUB_OFFLINE."
        )


def _other_weights(names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickled:
        return f"only pickled weights ({pickled[0]!r}), which can run code and are never opened"
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"only GGUF files ({gguf[0]!r}), which are for llama.cpp"
    others = [name for name in names if name.endswith(".safetensors")]
    return f"neither {INDEX_NAME} nor {SINGLE_NAME}{f', only {others[0]!r}' if others else ''}"


@contextmanager
def explain_hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub library into a CheckpointError that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # Its errors come from several libraries, httpx or httpx2 among them, and have no class in common.
        raise CheckpointError(_explain(repo_id, revision, error)) from error


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    hub = HfApi().endpoint
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # This error only says that the cache has no copy either; its cause says why the Hub failed.
        error = error.__cause__
    if isinstance(error, hub_errors.HFValidationError):
        return f"{repo_id!r} is neither a local folder nor a valid Hub id such as org/name."
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{repo_id} is gated. Ask for access at {hub}/{repo_id}, then {login}."
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision!r} on the Hub. Choose another --revision."
    status = error.response.status_code if isinstance(error, hub_errors.HfHubHTTPError) else None
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 401:
        return (
            f"There is neither a folder {repo_id!r} here nor a public model of that name at {hub}. Check the name; if "
            f"the model is private, {login}."
        )
    if isinstance(error, hub_errors.HfHubHTTPError):
        said = f" ({first_line(error.server_message)})" if error.server_message else ""
        return f"{hub} answered the request for {repo_id} with HTTP status {status}{said}. Try again later."
    return (
        f"There is no folder {repo_id!r} here, and fetching {repo_id} from {hub} failed: "
        f"{first_line(str(error)) or type(error).__name__}. Check the name, the "
        "connection and the free disk space, then run the same command again: downloaded files are kept. "
        "HF_HUB_OFFLINE=1 uses a copy that is in the Hub cache already."
    )


def first_line(text: str) -> str:
    """The first line of a library's or server's message, without its full stop, for use in an error message."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return "".join(char if char.isprintable() else "?" for char in line)[:300].rstrip(".")


def read_hub_headers(repo_id: str, revision: str | None) -> tuple[Mapping[str, TensorEntry], tuple[str, ...]]:
    """Every tensor of the repository's safetensors files, by name, through huggingface-hub; and notes, as of
    `Checkpoint`.

    Raises CheckpointError if there are none, the Hub cannot be reached, or a header is damaged.
    """
    import huggingface_hub.utils
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    with explain_hub_errors(repo_id, revision):
        try:
            metadata = HfApi().get_safetensors_metadata(repo_id, revision=revision)
        except NotASafetensorsRepoError:
            raise CheckpointError(
                f"{repo_id} has neither {INDEX_NAME} nor {SINGLE_NAME} on the Hub. Only safetensors weights are read."
            ) from None
        except (SafetensorsParsingError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The library hardly checks a header before it uses it.
            raise CheckpointError(
                f"{repo_id} has a damaged safetensors header on the Hub: {first_line(str(error))}. Choose another "
                "--revision or another copy of the model."
            ) from None
    tensors = {}
    for file, parsed in metadata.files_metadata.items():
        header = {
            # The library converts each byte range to a tuple.
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [*info.data_offsets]}
            for name, info in parsed.tensors.items()
        }
        # An untrusted header: it has to pass the same checks as that of a local file.
        for entry in header_entries(Path(repo_id) / file, file, header, 0)[0]:
            tensors[entry.name, file] = entry
    if not tensors:
        raise CheckpointError(f"{repo_id} has no tensors. Choose another --revision or another copy of the model.")
    # (One in two files has to be the same in both: that is checked once they are downloaded.)
    found = {name: entry for (name, _), entry in tensors.items()}
    return found, tuple(index_notes(metadata.weight_map, found))
