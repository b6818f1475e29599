"""Facts about a config that are found once per process, however many runs of the same model need them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest


@contextmanager
def found_once() -> Iterator[None]:
    """Find once what is found of a config by building other models of it: how outputs load, and where channels are.

    That is a third of what a run of a tiny model takes, and hundreds of tests have the same few configs. (The tests of
    these functions call them themselves.)
    """
    from streamprune.models import expert_channels, per_layer_loading
    from streamprune.models import open as open_module
    from streamprune.planning import prepare

    loading, channels = per_layer_loading.find_loading_facts, expert_channels.find_channels
    found = dict[str, Any]()

    def once(key: Any, find: Callable[[], Any]) -> Any:
        if repr(key) not in found:
            found[repr(key)] = find()
        return found[repr(key)]

    def of_model(config: Any, skeleton: Any) -> list[Any]:
        where = (skeleton.layers_path, sorted(skeleton.experts.items()), skeleton.spec)
        return [type(config), config.to_json_string(), type(skeleton.model), skeleton.model.dtype, where]

    def find_loading_facts(raw: Any, config: Any, skeleton: Any) -> Any:
        key = [json.dumps(raw, sort_keys=True), *of_model(config, skeleton)]
        return once(key, lambda: loading(raw, config, skeleton))

    def find_channels(config: Any, skeleton: Any, *more: Any) -> Any:
        def find() -> dict[str, Any]:
            each = channels(config, skeleton, *more)
            # (Not the model itself, which would never be freed.)
            return {"width": each.width, "channels": each.channels, "fixed_width": each.fixed_width}

        return replace(skeleton, **once([*of_model(config, skeleton), more], find))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_layer_loading, "find_loading_facts", find_loading_facts)
        patch.setattr(prepare, "find_loading_facts", find_loading_facts)
        patch.setattr(open_module, "find_channels", find_channels)
        yield
