"""The demo: a small model made and trained on the spot, pruned and measured. `run_demo` is its entry."""

from streamprune.demo.demo import CODE, MIX, DemoResult, Measured, Variant, run_demo
from streamprune.demo.train import TrainedModel, trained_model

__all__ = ["CODE", "MIX", "DemoResult", "Measured", "TrainedModel", "Variant", "run_demo", "trained_model"]
