"""The report of an output: its numbers are those of the files, and it needs nothing else."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from msgspec import convert
from PIL import Image

from streamprune.fit.estimate import Estimate
from streamprune.fit.footprint import read_footprint
from streamprune.formats.base import ChannelMask
from streamprune.hardware.memory import format_bytes
from streamprune.reporting import maps
from streamprune.reporting.facts import read_facts
from streamprune.reporting.record import Record
from streamprune.reporting.write import ALL_PICTURES, markers, page_of, sections_of, with_sections, write_report
from streamprune.saliency.scores_file import read_scores
from streamprune.targets import ServingSpec
from tests.helpers import known_family, prune, tree_bytes
from tests.reports import (
    CONTEXT,
    TASKS,
    Reported,
    Tables,
    call,
    generation_result,
    log_of,
    put,
    record_of,
    tables,
    text_result,
)
from tests.tiny import make_model, tiny_config, write_token_ids

#: Pictures of outputs whose experts became narrower, or were refitted.
OF_NARROWER = {"energy", "channels", "refit"}


def test_the_tables_hold_the_numbers_of_the_record(reported: Reported) -> None:
    page, layers = tables(reported.output), record_of(reported.output)["layers"]
    by_layer = page.rows("Experts by layer")
    scores = page.found["Scores by layer and expert; struck out: removed"]
    tokens = page.rows("Tokens per expert by layer")
    assert len(by_layer) == len(tokens) == len(layers) == 4
    for layer, row, cells, told in zip(layers, by_layer, scores[1:], tokens, strict=True):
        kept = set(layer["kept"])
        lowest = min(layer["scores"][expert] for expert in kept)
        gone = [layer["scores"][expert] for expert in range(8) if expert not in kept]
        assert row[:3] == [str(layer["index"]), str(len(kept)), str(8 - len(kept))]
        assert row[4:6] == [f"{lowest:#.4g}", f"{max(gone):#.4g}" if gone else "–"]
        assert cells[0] == (str(layer["index"]), False)
        assert [text for text, _ in cells[1:]] == [f"{score:#.4g}" for score in layer["scores"]]
        assert [struck for _, struck in cells[1:]] == [expert not in kept for expert in range(8)]
        quarters = np.percentile(layer["counts"], (0, 25, 50, 75, 100))
        assert [float(text.replace(",", "")) for text in told[1:6]] == quarters.tolist()
        assert int(told[6]) == min(layer["counts"][expert] for expert in kept)
        assert int(told[7]) == layer["counts"].count(0)


def test_memory_retention_calibration_and_course_are_those_of_the_run(reported: Reported) -> None:
    page, (*layers, summary) = tables(reported.output), log_of(reported.output)
    memory = {row[0]: row[1:] for row in page.rows("Memory on one GPU")}
    before = Estimate(read_footprint(str(reported.model)), ServingSpec(context=CONTEXT))
    assert record_of(reported.output)["use"]["budget_bytes"] == summary["memory"]["budget_bytes"]
    for term in summary["memory"]["terms"]:
        assert memory[term["name"]][1] == format_bytes(term["bytes"])
    assert {term.name: format_bytes(term.bytes) for term in before.terms}.items() <= {
        name: row[0] for name, row in memory.items()
    }.items()
    assert memory["total"] == [format_bytes(before.total), format_bytes(summary["memory"]["total_bytes"])]
    budget = f"free in the budget of {format_bytes(summary['memory']['budget_bytes'])}"
    missing = before.total - summary["memory"]["budget_bytes"]
    assert memory[budget] == [
        f"does not fit: {format_bytes(missing)} over", format_bytes(summary["memory"]["left_bytes"])
    ]  # fmt: skip
    kept = {row[0]: row[1:3] for row in page.rows("Saliency kept by source")}
    assert kept == {
        name: [f"{each['kept']:.1%}", f"{each['best']:.1%}"] for name, each in summary["domain_retention"].items()
    }
    assert page.rows("Calibration text by source") == [
        [name, "–", "4", "96", "50.0%", "unweighted"] for name in ("one.jsonl", "two.jsonl")
    ]
    course = page.rows("The run by layer")
    assert course == [
        [str(each["block"]), f"{each['at_seconds']:.1f}", f"{each['seconds']:.2f}", format_bytes(each["peak_bytes"])]
        for each in layers
    ]
    assert "every byte was compared with the source" in (reported.output / "report.html").read_text()


def test_the_tables_hold_the_numbers_of_the_evaluations(copied: Path) -> None:
    text = text_result("one", "two")
    put(copied, "text.json", text)
    put(copied, "generation.json", generation_result())
    put(copied, "tasks.json", TASKS)
    other = {"arc_easy": {"acc,none": 0.9}}
    put(copied, "tasks-against-better-0123abcd.json", TASKS | {"against": "better", "original_results": other})
    write_report(copied)
    page = tables(copied)
    for row, each in zip(
        page.rows("Divergence from the original, nats per token"), [*text["sources"], text["all"]], strict=True
    ):
        low, high = each["kl_interval"]
        assert row == [each.get("name", "all"), f"{each['kl']:#.4g}", f"{low:#.4g} to {high:#.4g}",
                       f"{each['kl_p99']:#.4g}", "87.5%", "–"]  # fmt: skip
    for row, each in zip(page.rows("Loss, nats per token"), text["sources"], strict=False):
        assert row[1:3] == [f"{each['tokens']:,}", f"{each['loss']:#.4g}"]
        assert float(row[4].replace(",", "")) == pytest.approx(each["perplexity"], rel=1e-3)
        assert row[6:9] == [f"{each[key]:#.4g}" for key in ("original_loss", "original_perplexity", "loss_increase")]
    depth = page.rows("Relative error of the hidden states after each layer")
    assert [row[1] for row in depth] == [f"{value:#.4g}" for value in text["sources"][0]["hidden_error"]]
    assert page.rows("Continuations") == [
        [name, "16", "25.0%", "75.0%", "50.0%"]
        for name in ("greedy, chat, thinking on", "greedy, chat, thinking on, the original")
    ]
    assert page.rows("Tasks") == [["arc_easy", "acc", "0", "50", "0.7500", "0.013", "0.8000", "5.0", "93.8%"]]
    title = "Tasks, against better, which is not what this model was made from"
    assert page.rows(title) == [["arc_easy", "acc", "0", "50", "0.7500", "0.013", "0.9000", "15", "83.3%"]]
    assert "enable_thinking=False" in (copied / "report.html").read_text()
    card = (copied / "README.md").read_text()
    assert "gets into loops" in card
    assert (
        0
        < card.index("lm-evaluation-harness, against original:")
        < card.index("lm-evaluation-harness, against better, which is not what this model was made from:")
    )
    assert "| 0.7500 | 0.013 | 0.8000 | 5.0 | 93.8% |" in card
    assert "enable\\_thinking=False" in card
    one = text["sources"][0]
    assert (
        f"| one | 4,000 | {1.25 - 0.0625:#.4g} | 1.250 | {one['perplexity']:#.4g} | 0.06250 | 0.03125 to 0.1250 | "
        f"{one['kl_p99']:#.4g} | 87.5% |"
    ) in card
    assert "| all | " in card
    assert "On text that was held out of the calibration, against the original; " in card
    drawn = {path.stem for path in (copied / "pictures").iterdir()}
    assert drawn == ALL_PICTURES - OF_NARROWER - {"search"}
    for name in set(re.findall(r"\]\(pictures/(\w+)\.png\)", card)) | drawn:
        with Image.open(copied / "pictures" / f"{name}.png") as picture:
            assert picture.width == 960


def summary_of(output: Path) -> str:
    """The first part of the page: what is above all tables and pictures, without tags."""
    page = (output / "report.html").read_text()
    short = page.partition('<div class="short">')[2].partition("</div>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "", short))


def test_the_summary_stands_first(reported: Reported, copied: Path) -> None:
    record, told = record_of(copied), summary_of(reported.output)
    kept = sum(len(layer["kept"]) for layer in record["layers"])
    assert f"{1 - kept / 32:.0%} of the experts' weights are removed: " in told
    assert "arXiv:2510.13999" in told
    assert "What was lost was not measured: streamprune eval does it" in told
    assert f"To serve 1 x {CONTEXT} tokens it takes about" in told
    assert "it fits rtx-5060-ti-8gb (CUDA can use 7.46 GiB), and 27 other known GPUs" in told
    # Layers that keep different numbers are served by transformers alone.
    assert "vllm serve" not in told
    assert "trust_remote_code=True" in told
    text = text_result("one", "two")
    put(copied, "text.json", text)
    for layer in record["layers"]:
        layer["kept"] = [0, 1, 2, 3]
    rounded = {"tokens": [5] * 4, "nearest": [1], "nearest_linears": [], "before": 0.25, "after": 0.125}
    record["rounding"] = {"tokens": 9000, "layers": [{"index": layer, **rounded} for layer in range(4)]}
    facts = replace(read_facts(copied), record=convert(record, Record), retained=(), energy=())
    page = page_of(facts, {each.name: each for each in sections_of(facts)}, {})
    told = html.unescape(re.sub(r"<[^>]+>", "", page.partition('<div class="short">')[2].partition("</div>")[0]))
    assert "50% of the experts' weights are removed: around 50 % the loss is noticeable" in told
    assert "--evaluate" not in told
    whole = text["all"]
    assert (
        f"its loss is {whole['loss']:#.4g} nats per token (the original: {whole['original_loss']:#.4g}), "
        f"its KL divergence {whole['kl']:#.4g}"
    ) in told
    assert "the same in 87.5% of the places" in told
    assert f"<pre>vllm serve . --max-model-len {CONTEXT}</pre>" in page
    assert f"--outtype f32\nllama-server -m model.gguf -c {CONTEXT}</pre>" in page
    shown = Tables(page)
    assert shown.rows("The rounding by layer") == [[str(layer), "25.0%", "12.5%", "1"] for layer in range(4)]
    assert "4 experts were reached by too few of these tokens" in page
    # Where a program does not take the model, the reason stands instead: here more groups than all experts could fill.
    config = {**facts.config, "n_group": 4, "topk_group": 2, "quantization_config": {"quant_method": "<awq>"}}
    page = page_of(replace(facts, config=config), {each.name: each for each in sections_of(facts)}, {})
    assert "<p>Not with vLLM: vLLM&#39;s router drops its 4 groups without a word, and picks other experts, " in page
    assert "<p>Not with llama.cpp: llama.cpp ends with an error unless each of the router&#39;s 4 groups " in page
    assert "does not read weights stored as &lt;awq&gt;; write them decoded with --weights bf16.</p>" in page
    assert "<pre>" not in page


def test_colours_can_be_read_in_grey() -> None:
    shades = matplotlib.colormaps[maps._COLOURS](np.linspace(0, 1, 64))[:, :3]
    lightness = shades @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()
    assert lightness[-1] - lightness[0] > 0.7


def test_the_same_input_gives_the_same_bytes(reported: Reported, copied: Path) -> None:
    put(copied, "text.json", text_result("one", "two"))
    write_report(copied)
    first = tree_bytes(copied)
    write_report(copied)
    assert tree_bytes(copied) == first
    shutil.rmtree(copied / "evaluation")
    write_report(copied)
    found, first = tree_bytes(copied), tree_bytes(reported.output)
    cards = [each.pop("README.md") for each in (found, first)]
    assert found == first, "what an evaluation added has gone with it"
    assert cards[0] == with_sections(cards[1], {}) + b"\n" + ("\n".join(markers("evaluation")) + "\n").encode()


def test_the_page_needs_nothing_else(copied: Path) -> None:
    put(copied, "text.json", text_result("one", "two"))
    write_report(copied)
    page = (copied / "report.html").read_text()
    tags = Tables(page).tags
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in tags}
    links = [
        value or "" for _, attributes in tags for name, value in attributes.items() if name.endswith(("href", "src"))
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "figures share no names"
    # (Their namespaces are names, which nobody fetches.)
    assert set(re.findall(r"https?://[^\"<]*", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_names_from_strangers_are_only_text(copied: Path) -> None:
    name = "<script>alert(1)</script>|$\\frac{`&\"' [x](http://e.vil)"
    put(copied, "text.json", text_result(name, "two"))
    put(copied, "generation.json", {**generation_result(), "advice": [name]})
    put(copied, "tasks.json", {"results": {name: {f"acc{name},none": 0.5}}})
    record = record_of(copied)
    record["settings"] |= {"model": name, "method": name}
    (copied / "streamprune.json").write_text(json.dumps(record))
    before = (copied / "README.md").read_bytes()
    write_report(copied)
    page = (copied / "report.html").read_text()
    assert "<script" not in page
    assert any(name in row for row in tables(copied).rows("Loss, nats per token"))
    added = (copied / "README.md").read_bytes()[len(before) - 400 :].decode()
    assert "<script" not in added
    assert re.search(r"(?<!\\)\]\(http", added) is None
    rows = [line for line in added.splitlines() if line.startswith("| &lt;script")]
    assert len(rows) == 2
    assert all(line.count("|") == columns for line, columns in zip(rows, (10, 7), strict=True))


def test_what_is_missing_is_said(copied: Path) -> None:
    Path(f"{copied}.streamprune.log").unlink()
    shutil.rmtree(copied / "scores")
    (copied / "README.md").unlink()
    write_report(copied)
    page = (copied / "report.html").read_text()
    assert "There is no log (out.streamprune.log) next to the model" in page
    assert "Unknown: the model has no scores file" in page
    assert "Not measured. <code>streamprune eval</code>" in page
    assert not (copied / "README.md").exists()
    assert not (copied / "pictures" / "course.png").exists()
    assert "Memory on one GPU" in tables(copied).found, "by the names of the tensors alone"


def test_the_log_of_another_run_is_not_taken(copied: Path) -> None:
    *layers, summary = log_of(copied)
    summary["experts_per_layer"] = 7
    Path(f"{copied}.streamprune.log").write_text("".join(json.dumps(event) + "\n" for event in (*layers, summary)))
    write_report(copied)
    assert "belongs to another run" in (copied / "report.html").read_text()
    assert "The run by layer" not in tables(copied).found


def test_a_choice_by_hand_has_a_report_without_scores(reported: Reported, tmp_path: Path) -> None:
    choice = tmp_path / "keep.json"
    choice.write_text(json.dumps([[0, 1, 2], [3, 4], [1, 2, 7], [5, 6, 7]]))
    told = call("prune", reported.model, "-o", tmp_path / "out", "--keep-file", choice, "--report")
    assert told.exit_code == 0, told.output
    assert told.stderr.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    page = tables(tmp_path / "out")
    cells = page.found["Scores by layer and expert; struck out: removed"][2][1:]
    assert [number for number, (_, struck) in enumerate(cells) if not struck] == [3, 4]
    memory = {row[0]: row[1:] for row in page.rows("Memory on one GPU")}
    assert memory["weights: experts"][0] == format_bytes(4 * 8 * 3 * 64 * 32 * 4)
    assert memory["weights: experts"][1] == format_bytes(11 * 3 * 64 * 32 * 4)
    assert "Tokens per expert by layer" not in page.found


@pytest.mark.parametrize(
    ("family", "settings"),
    [("granitemoe", {}), ("gpt_oss", {"schedule": "linear-increase", "spread": 0.3}), ("deepseek_v3", {"keep": 6})],
)
def test_the_memory_before_is_the_sources(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Where experts lie in one tensor or in many, and layers keep equal numbers or not."""
    model = make_model(tmp_path / "model", tiny_config(known_family(family)))
    result = prune(model, tmp_path / "out", context=CONTEXT, **settings)
    memory = read_facts(tmp_path / "out").memory
    assert not isinstance(memory, str)
    assert [vars(term) for term in memory.after.terms] == result.summary["memory"]["terms"]
    assert memory.before is not None
    assert memory.before.terms == Estimate(read_footprint(str(model)), ServingSpec(context=CONTEXT)).terms


@pytest.fixture(scope="module")
def narrower(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """An output with narrower and refitted experts, of two sources."""
    home = tmp_path_factory.mktemp("narrower")
    model = make_model(home / "model", tiny_config(known_family("qwen3_moe")))
    sources = [write_token_ids(home / f"{name}.jsonl", seed=seed) for seed, name in enumerate(("one", "two"))]
    words = [word for source in sources for word in ("--calibration", source)]
    output = home / "out"
    options = ("--keep", 6, "--width", 12, "--refit", "--mix", "one.jsonl=3,two.jsonl=1", "--report", "--json")
    told = call("run", model, "-o", output, *words, *options)
    assert told.exit_code == 0, told.output
    return Reported(model, output, told)


def test_narrower_experts_have_the_energy_that_stays(narrower: Reported) -> None:
    page, record = tables(narrower.output), record_of(narrower.output)
    summary = json.loads(narrower.told.stdout)
    kept = {row[0]: row[1:3] for row in page.rows("Energy kept by source")}
    assert kept == {
        name: [f"{each['kept']:.1%}", f"{each['best']:.1%}"] for name, each in summary["energy_kept"].items()
    }
    scores = read_scores(narrower.output / "scores" / "scores.safetensors")
    by_layer = page.rows("Energy kept by layer and source")
    by_rank = page.rows("Share of the energy in the best of 32 channels of each expert")
    for layer, told, row, ranks in zip(scores.layers, record["layers"], by_layer, by_rank, strict=True):
        assert layer.channels is not None
        channels = ChannelMask.from_text(told["channels"], 32, 6).indices
        stays = layer.channels[:, np.array(told["kept"])[:, None], channels].astype(float).sum(axis=(1, 2))
        whole = layer.channels.astype(float).sum(axis=(1, 2))
        assert row == [str(layer.index), *(f"{share:.1%}" for share in stays / whole)]
        mixed = 3 * layer.channels[0].astype(float) + layer.channels[1]
        best = np.sort(mixed, axis=1)[:, ::-1].sum(axis=0)
        assert ranks[1:] == [f"{best[:width].sum() / best.sum():.1%}" for width in (4, 8, 16, 24, 12)]
    html = (narrower.output / "report.html").read_text()
    assert "layer 0/3: kept 6/8 with 12/32 channels, fewest tokens" in narrower.told.stderr
    assert [each["channels"] for each in log_of(narrower.output)[:-1]] == [[12, 32]] * 4
    assert "each expert keeps 12 of 32 (62.5% removed)" in html
    assert "Each keeps 12 of its 32 channels." in html
    assert {path.stem for path in (narrower.output / "pictures").iterdir()} == ALL_PICTURES - {
        "loss",
        "depth",
        "search",
    }


def test_a_refit_has_its_errors_and_shares(narrower: Reported) -> None:
    page, record = tables(narrower.output), record_of(narrower.output)
    for told, row in zip(record["refit"]["layers"], page.rows("The refit by layer"), strict=True):
        shares = told["shares"]
        assert row[:4] == [
            str(told["index"]), f"{told['before']:.1%}", f"{told['after']:.1%}", f"{6 - shares.count(0)} of 6"
        ]  # fmt: skip
        assert [float(cell) for cell in row[4:7]] == pytest.approx(
            [min(shares), np.mean(shares), max(shares)], rel=1e-3
        )
        assert row[7] == f"{min(told['tokens']):,}"
    html = (narrower.output / "report.html").read_text()
    names = "<code>model.layers.*.mlp.experts.*.down_proj.weight</code>"
    assert f"{len(record['computed'])} tensors were computed ({names})" in html
    assert "without an anchor of general text" in html


def test_where_all_experts_stay_only_their_channels_are_told(narrower: Reported, tmp_path: Path) -> None:
    scores, output = narrower.output / "scores" / "scores.safetensors", tmp_path / "out"
    told = call("prune", narrower.model, "-o", output, "--scores", scores, "--width", 12, "--report")
    assert told.exit_code == 0, told.output
    assert "domain retention" not in told.stderr
    assert "energy kept, the share of each source's energy of all channels (in brackets: " in told.stderr
    page = tables(output)
    assert "Saliency kept by source" not in page.found
    assert "Energy kept by source" in page.found
    shutil.rmtree(output / "scores")
    write_report(output)
    assert "Unknown: the model has no scores of channels" in (output / "report.html").read_text()
    assert not OF_NARROWER & {path.stem for path in (output / "pictures").iterdir()}


def test_where_nothing_is_removed_no_retention_is_told(reported: Reported, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--scores", reported.output, "--weights", "fp8", "--rounding", "rtn", "--report"]
    told = call("prune", reported.model, "-o", output, *given)
    assert told.exit_code == 0, told.output
    assert "domain retention" not in told.stderr
    page = (output / "report.html").read_text()
    assert "Nothing of the experts was removed: only how weights are stored has changed." in page
    assert "Saliency kept by source" not in tables(output).found
    assert "Domain retention" not in (output / "README.md").read_text()
