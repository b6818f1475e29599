"""The layer for multi-token prediction (MTP), which transformers' models do not have, as a further layer to be scored.

It is computed as engines do: a decoder layer of the class of the model's last layer with experts, on

    x_i = W · [norm_e(embedding(t_i+1)); norm_h(norm(h_i))]

with h_i what leaves the model's layers at token i, and `norm` the model's own behind them. So the last token of a
sequence, which no token follows, does not enter it. (Some engines put zeros in place of the embedding at the first
position. Only that one position differs.) Shapes: B sequences of L tokens, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils import _pytree as pytree

from streamprune.models.expert_layout import Target
from streamprune.models.open import OpenedMoE
from streamprune.models.survey import final_norm, mtp_targets
from streamprune.streaming.forward import hidden_states_of
from streamprune.work.saved_states import BatchState


class MtpLayer:
    """The MTP layer of an opened model whose layout says how it is computed.

    `index` is its number behind the model's layers, `source` that of the layer whose module it takes. `tensors` are the
    checkpoint's tensors of the layer itself, by what they feed in that module. `entrance` are the modules that make its
    input, on meta until they are loaded, and `parameters` those by the names of their tensors.
    """

    def __init__(self, opened: OpenedMoE) -> None:
        layout, skeleton, checkpoint = opened.layout, opened.skeleton, opened.checkpoint
        form, norm = layout.mtp_form, final_norm(skeleton)
        assert form is not None
        assert norm is not None
        self.index, self.source, self._form = layout.layer_count, layout.mtp_source, form
        entries = {name: checkpoint.tensors[name] for name in layout.mtp if name.startswith(f"{form.path}.")}
        self.tensors: Mapping[str, Target] = mtp_targets(skeleton, entries, checkpoint.config, form.path, form.like)
        self._embedding, self._norm = skeleton.model.get_input_embeddings(), skeleton.model.get_submodule(norm)
        # Norms differ by family (some add 1 to their weights), but not within a model.
        like, width = copy.deepcopy(self._norm).to("meta"), self._embedding.weight.shape[1]
        projection = nn.Linear(2 * width, width, bias=False, device="meta", dtype=opened.dtype)
        self.entrance = nn.ModuleList([like, copy.deepcopy(like), projection])
        names = (form.embedding_norm, form.hidden_norm, form.projection)
        self.parameters: Mapping[str, nn.Module] = dict(zip(names, self.entrance, strict=True))

    def renamed(self, parameter: str) -> str:
        """The name of a parameter of this layer as the model's own layer would have it."""
        return self._form.like + parameter.removeprefix(self._form.path)

    def load_entrance(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the weights that make the layer's input, from their plain tensors by name."""
        for name, module in self.parameters.items():
            dtype = module.get_parameter("weight").dtype
            module._parameters["weight"] = nn.Parameter(tensors[name].to(dtype), requires_grad=False)

    @torch.no_grad()
    def entering(self, ids: torch.Tensor, state: BatchState) -> tuple[torch.Tensor, BatchState]:
        """What enters the layer, from token ids (B, L) and the state behind the model's last layer: the ids of the next
        tokens (B, L-1), and a state with the x_i (B, L-1, H) in place of the hidden states.
        """
        embedding_norm, hidden_norm, projection = self.entrance
        following, hidden = ids[:, 1:], hidden_states_of(state)
        before = hidden_norm(self._norm(hidden[:, :-1]))
        # (Norms may be kept in float32.)
        joined = torch.cat([embedding_norm(self._embedding(following)), before], dim=-1)
        mixed = projection(joined.to(projection.get_parameter("weight").dtype))
        output = pytree.tree_map(lambda leaf: mixed if leaf is hidden else leaf, state.output)
        return following, BatchState(output)
