"""What --help prints: options and commands in groups by what people want, common ones first, with examples.

A few lines on top of click do it; pyproject.toml says what speaks against its add-ons.
"""

from __future__ import annotations

from typing import Any

import click

#: Groups of options, in the order in which they are shown. An option means the same in all commands.
GROUPS: dict[str, tuple[str, ...]] = {
    "How far to prune, or what it has to fit": (
        "keep", "ratio", "total", "budget_gib", "gpu", "context", "batch", "kv_dtype", "gguf", "for_engine",
        "round_for", "width", "by", "width_multiple", "best", "candidates", "drop_above",
    ),
    "Input and output": (
        "output", "repo_id", "source", "private", "model", "dry_run", "overwrite", "report", "everything", "revision",
        "trust_remote_code", "max_shard_size",
    ),
    "Text": ("calibration", "data", "samples", "seq_len", "seed", "date", "skip_bad"),
    "Which experts stay": (
        "scores", "method", "mix", "schedule", "spread", "floor", "protect_super_experts", "keep_file", "compare",
        "layer", "propagate", "channels",
    ),
    "What is written of them": (
        "weights", "quantize", "rounding", "tensor_parallel", "refit", "anchor", "mtp", "imatrix",
    ),
    "What is measured": ("evaluate", "stop_if_kl", "verify", "measure", "against", "against_revision"),
    "Continuations": ("generate", "prompts", "prompts_per_source", "prompt_tokens", "max_new_tokens"),
    "Tasks of lm-evaluation-harness": (
        "tasks", "include_path", "limit", "batch_size", "num_fewshot", "apply_chat_template", "thinking", "gen_kwargs",
        "allow_code", "server", "served_model",
    ),
    "Machine and memory": ("device", "dtype", "batch_tokens", "states", "vram_gib", "ram_gib"),
    "After an interruption": ("work_dir", "resume", "from_layer", "checkpoint_every"),
    "On the terminal": ("quiet", "as_json", "help"),
}  # fmt: skip
#: What the value of an option is, unless the option says it itself.
METAVARS = {
    "output": "FOLDER", "work_dir": "FOLDER", "scores": "FILE|FOLDER", "keep_file": "FILE", "source": "MODEL",
    "model": "MODEL", "revision": "BRANCH|TAG|COMMIT", "against_revision": "BRANCH|TAG|COMMIT", "keep": "N",
    "total": "N", "batch": "N", "samples": "N", "seed": "N", "batch_size": "N", "ratio": "SHARE", "spread": "SHARE",
    "width": "W", "context": "TOKENS", "seq_len": "TOKENS", "batch_tokens": "TOKENS", "vram_gib": "GIB",
    "ram_gib": "GIB", "budget_gib": "GIB", "max_shard_size": "SIZE", "device": "auto|cpu|cuda:0",
}  # fmt: skip
#: Commands by what people want.
COMMANDS = {
    "Prune": ("run", "search", "score", "prune"),
    "Look before": ("fit", "calibration", "inspect", "devices", "demo"),
    "Look at the result": ("eval", "report", "verify", "push"),
    "After an interruption": ("status", "resume", "clean"),
}
#: What a command's exit status says. From 75 on the same command goes on; those below are final.
STATUSES = (
    ("0", "Done."),
    ("1", "An error, which the message names."),
    ("2", "Settings that make no sense or cannot be met."),
    ("3", "Nothing fits the memory."),
    ("4", "Refused, as --stop-if-kl asks."),
    ("75", "Stopped on request: finished work is saved, and the same command goes on, as after a kill (128 and more)."),
)
_MODEL = "Qwen/Qwen3-30B-A3B"
EXAMPLES = {
    "run": (
        f"streamprune run {_MODEL} -o pruned --gpu rtx-3090 --calibration my-text.jsonl",
        f"streamprune run {_MODEL} -o half --ratio 0.5 --calibration agentic --evaluate",
    ),
    "search": (f"streamprune search {_MODEL} -o found --gpu rtx-3090 --calibration my-text.jsonl",),
    "score": (f"streamprune score {_MODEL} -o scores.safetensors --calibration agentic",),
    "prune": (f"streamprune prune {_MODEL} -o half --scores scores.safetensors --keep 64",),
    "fit": (f"streamprune fit {_MODEL} --gpu rtx-3090 --context 32768",),
    "show": (f"streamprune calibration show agentic --model {_MODEL}",),
    "inspect": ("streamprune inspect scores.safetensors --ratio 0.5 --mix code=0.7,general=0.3",),
    "devices": ("streamprune devices",),
    "demo": ("streamprune demo -o demo-output",),
    "eval": (
        f"streamprune eval half --against {_MODEL} --data my-other.jsonl",
        "streamprune eval half --tasks hellaswag,arc_easy --limit 100",
    ),
    "report": ("streamprune report half",),
    "verify": (f"streamprune verify half --source {_MODEL}",),
    "push": ("streamprune push half --repo-id me/half --dry-run",),
    "status": ("streamprune status half.work",),
    "resume": ("streamprune resume half.work",),
    "clean": ("streamprune clean half.work",),
}


class Command(click.Command):
    """A command whose --help has its options in groups, and examples."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        for option in self.params:
            if isinstance(option, click.Option) and option.metavar is None and _takes_text(option):
                option.metavar = METAVARS.get(option.name or "")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in their groups."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        # (click's own name of its option is none that anybody typed.)
        left = {"help" if "--help" in each.opts else str(each.name): each for each in options}
        for title, names in (*GROUPS.items(), ("More", tuple(left))):
            found = [left.pop(name).get_help_record(ctx) for name in names if name in left]
            if rows := [row for row in found if row is not None]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each on a line of its own, so that it can be pasted."""
        with formatter.section("Examples"):
            for line in EXAMPLES.get(self.name or "", ()):
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def _takes_text(option: click.Option) -> bool:
    return not option.is_flag and not isinstance(option.type, click.Choice)


def format_commands(group: click.Group, formatter: click.HelpFormatter) -> None:
    """Write a group's commands by what people want, each with its whole first sentence, and the exit statuses."""
    left = dict(group.commands)
    for title, names in (*COMMANDS.items(), ("Commands", tuple(left))):
        rows = [(name, left.pop(name).get_short_help_str(limit=1000)) for name in names if name in left]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
    with formatter.section("Exit status"):
        formatter.write_dl(STATUSES)
