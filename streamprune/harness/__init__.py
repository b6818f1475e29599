"""Tasks of lm-evaluation-harness, run on a whole model."""

from streamprune.harness.lines import tasks_lines
from streamprune.harness.tasks import run_tasks

__all__ = ["run_tasks", "tasks_lines"]
