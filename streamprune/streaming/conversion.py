"""Loading checkpoint tensors into a model's modules, through transformers' own conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from streamprune.errors import CheckpointError
from streamprune.hardware.memory import says_out_of_memory


class Conversion:
    """How the tensors of the checkpoint in `folder` become the parameters of `model`: in `dtype`, on `device`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
        self.model, self._folder = model, folder
        self._config = LoadStateDictConfig(
            weight_mapping=get_model_conversion_mapping(model),
            dtype=dtype,
            # Some parameters (router biases) must stay in float32 whatever the dtype.
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device},
        )

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the parameters that these tensors feed; all tensors of a parameter have to be there.

        Raises CheckpointError for tensors that do not fit the model, and MemoryError if memory runs out.
        """
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._config)
        problems = [*info.conversion_errors.values(), *info.mismatched_keys, *info.error_msgs]
        # transformers catches all errors of the conversion, and keeps their text.
        for line in "\n".join(map(str, problems)).splitlines():
            if says_out_of_memory(line):
                raise MemoryError(line)
        if problems:
            raise CheckpointError(
                f"{self._folder}: {len(problems)} tensors do not fit the model that config.json describes, first: "
                f"{problems[0]}"
            )
