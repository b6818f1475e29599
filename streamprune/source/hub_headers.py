"""The headers of a model's safetensors files on the Hub, read by range requests: kilobytes instead of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streamprune.errors import CheckpointError
from streamprune.source.checkpoint import INDEX_NAME, SINGLE_NAME, TensorEntry
from streamprune.source.hub import first_line, hub_errors_told
from streamprune.source.shard import header_entries


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
        except (SafetensorsParsingError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The library looks at little of a header before it uses it.
            raise CheckpointError(
                f"{repo_id} has a damaged safetensors header on the Hub: {first_line(str(error))}. Choose another "
                "--revision or another copy of the model."
            ) from None
    tensors = {}
    for file, parsed in metadata.files_metadata.items():
        header = {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": _as_list(info.data_offsets)}
            for name, info in parsed.tensors.items()
        }
        # A stranger's header: its figures have to pass the same checks as those of a file on this disk.
        for entry in header_entries(Path(repo_id) / file, file, header, 0)[0]:
            tensors[entry.name, file] = entry
    for name, file in metadata.weight_map.items():
        if (name, file) not in tensors:
            raise CheckpointError(
                f"{repo_id}: {INDEX_NAME} says that tensor {name!r} is in {file}, but that file does not hold it."
            )
    if not tensors:
        raise CheckpointError(f"{repo_id} holds no tensors. Choose another --revision or another copy of the model.")
    return {name: tensors[name, file] for name, file in metadata.weight_map.items()}


def _as_list(value: object) -> object:
    """Byte ranges as JSON has them; the library makes tuples of them."""
    return list(value) if isinstance(value, tuple) else value
