"""The headers of a model's safetensors files on the Hub, read by range requests: kilobytes instead of the weights."""

from __future__ import annotations

from collections.abc import Mapping

from streamprune.checkpoint import INDEX_NAME, SINGLE_NAME, TensorEntry
from streamprune.errors import CheckpointError
from streamprune.hub import hub_errors_told


def read_hub_headers(repo_id: str, revision: str | None) -> Mapping[str, TensorEntry]:
    """Every tensor of the repository's safetensors files, by name, through huggingface-hub.

    Raises CheckpointError when there are none, the Hub cannot be reached, or a header is damaged.
    """
    import huggingface_hub.utils
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    with hub_errors_told(repo_id, revision):
        try:
            metadata = HfApi().get_safetensors_metadata(repo_id, revision=revision)
        except NotASafetensorsRepoError:
            raise CheckpointError(
                f"{repo_id} has neither {INDEX_NAME} nor {SINGLE_NAME} on the Hub. Only safetensors weights are read."
            ) from None
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{repo_id} has a damaged safetensors header on the Hub: {error}.") from None
    tensors = {}
    for name, file in metadata.weight_map.items():
        info = metadata.files_metadata[file].tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{repo_id}: {INDEX_NAME} says that tensor {name!r} is in {file}, but that file does not hold it."
            )
        begin, end = info.data_offsets
        tensors[name] = TensorEntry(name, file, str(info.dtype), tuple(info.shape), begin, end)
    return tensors
