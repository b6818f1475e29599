"""Generation health: whether a model's continuations end, or go round in circles."""

from streamprune.generation.health import GenerationSettings, generation_health
from streamprune.generation.lines import generation_lines

__all__ = ["GenerationSettings", "generation_health", "generation_lines"]
