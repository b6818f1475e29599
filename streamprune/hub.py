"""From what the user calls MODEL to a local folder: a path stays a path, a Hub id is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from streamprune.checkpoint import INDEX_NAME, PICKLE_SUFFIXES, SINGLE_NAME, WEIGHT_SUFFIXES
from streamprune.errors import CheckpointError


def resolve_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The local folder for `model`: a folder path, or a Hub id, whose needed files are downloaded to the Hub cache.

    Only safetensors named by the index and the small files beside them are fetched; Python files only with
    `trust_remote_code`. Raises CheckpointError when the model cannot be found, reached or has pickled weights only.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file. Give the folder that holds config.json and the *.safetensors files.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise CheckpointError(f"No folder {model!r} here. Give a local model folder or a Hub id such as org/name.")
    return _download(model, revision, trust_remote_code)


def _download(repo_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    # Imported here, since a local folder needs neither the library nor its start-up time.
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except OfflineModeIsEnabled:
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        # One commit for every file, even if the repository moves on during the download.
        commit = info.sha
        names = [sibling.rfilename for sibling in info.siblings or []]
        if INDEX_NAME in names:
            index = json.loads(Path(hf_hub_download(repo_id, INDEX_NAME, revision=commit)).read_text(encoding="utf-8"))
            weights = sorted(set(index["weight_map"].values()))
        elif SINGLE_NAME in names:
            weights = [SINGLE_NAME]
        else:
            pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
            what = (
                f"only pickled weights ({pickled[0]}), which are never opened" if pickled else "no safetensors weights"
            )
            raise CheckpointError(f"{repo_id} has {what}. Choose a safetensors version of the model.")
        wanted = [name for name in names if name in weights or _is_small_file(name, trust_remote_code)]
        return Path(snapshot_download(repo_id, revision=commit, allow_patterns=wanted))
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is neither a local folder nor a valid Hub id: {error}") from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo_id} is not in the local Hub cache and the Hub was not reached: {error}") from None
    except HfHubHTTPError as error:
        hint = "If it is private or gated, accept its terms on the Hub and log in with `hf auth login`."
        raise CheckpointError(
            f"The Hub did not give {repo_id} (revision {revision or 'main'}): {error}\n{hint}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"Downloading {repo_id} failed: {error}. Check the connection and the free disk space; "
            "what is already downloaded is kept, so run the same command again."
        ) from None


def _is_small_file(name: str, trust_remote_code: bool) -> bool:
    if "/" in name or name.startswith("."):
        # Subfolders hold copies in other formats ("original/", "onnx/"); chat templates are the exception.
        return name.startswith("additional_chat_templates/")
    if name.endswith(".py"):
        return trust_remote_code
    return not name.endswith((*WEIGHT_SUFFIXES, ".png", ".jpg", ".jpeg", ".gif", ".mp4", ".pdf", ".zip"))
