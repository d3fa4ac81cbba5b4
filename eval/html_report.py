"""`losa report`: records of benchmarks and training runs as one page that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from losa_export.eval.figures import check_drawing, ratio_figure, rounds_figure, sparsity_figure
from losa_export.eval.report import bench_notes
from losa_export.eval.report_sources import RunSource, Sources, find_sources
from losa_export.files import check_output_file, write_text_atomic

_MIB = 2**20


@dataclass(frozen=True)
class Table:
    """Headings and rows, all text; columns of `numbers` are set to the right."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()

    def html(self) -> str:
        """A table that scrolls sideways where the page is too narrow for it."""

        def row(cells: Sequence[str], tag: str) -> str:
            inside = "".join(
                f"<{tag}{' class=number' if place in self.numbers else ''}>{escape(cell)}</{tag}>"
                for place, cell in enumerate(cells)
            )
            return f"<tr>{inside}</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return f"<div class=wide><table><thead>{row(self.headings, 'th')}</thead><tbody>{body}</tbody></table></div>"

    def markdown(self) -> str:
        """The same as Markdown."""
        marks = ["---:" if place in self.numbers else "---" for place in range(len(self.headings))]
        lines = [self.headings, marks, *(tuple(cell.replace("|", "\\|") for cell in row) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Section:
    """A part of the report. `figure` is SVG; of `lines` a list is made, of `commands` a block of code."""

    title: str
    table: Table | None = None
    figure: str | None = None
    lines: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    text: str = ""


def write_report(places: Sequence[Path], html: Path, markdown: Path | None = None) -> Sources:
    """Write the page of all records in some files and folders.

    Args:
        places: where records are.
        html: file to write.
        markdown: likewise, without figures; None writes none.
    Returns: what was found.
    Raises: InputError if there is nothing to report; MissingDependencyError without matplotlib; OutputError.
    """
    check_drawing()
    for path in (html, markdown):
        if path is not None:
            check_output_file(path)
    sources = find_sources(places)
    sections = list(_sections(sources))
    write_text_atomic(html, _page(sections, sources))
    if markdown is not None:
        write_text_atomic(markdown, _markdown(sections))
    return sources


def _sections(sources: Sources) -> Iterator[Section]:
    documents = [source.document for source in sources.benches]
    if documents:
        figure = ratio_figure(
            [_label(document) for document in documents],
            {metric: [document[metric]["all_blocks"] for document in documents] for metric in ("decode", "prefill")},
        )
        yield Section(
            "Speed",
            _speed_table(documents),
            figure,
            text="Ratios are times of the baseline over those of the candidate, taken in turns in one run: above 1 the "
            "candidate is faster. The verdict is FASTER or SLOWER only if the whole interval lies on one side of 1.",
        )
        points = _by_sparsity(documents)
        if points:
            yield Section("Decode time against sparsity", figure=sparsity_figure(points))
        yield Section("Size, memory and loading", _size_table(documents))
        yield Section("What was checked, and what to mind", lines=tuple(_remarks(documents)))
        yield Section("Machine", _machine_table(documents))
        commands = dict.fromkeys(_command(document) for document in documents)
        yield Section("How to run it again", commands=tuple(commands))
    for run in sources.runs:
        yield Section(
            f"Training: {run.folder.resolve().name}", _rounds_table(run), rounds_figure(run.rounds, run.folder.name)
        )
    if sources.skipped:
        yield Section("Left out", lines=tuple(f"{path.name}: {reason}" for path, reason in sources.skipped))


def _label(document: Mapping[str, Any]) -> str:
    candidate, config = document["candidate"], document["config"]
    threads = f"{document['threads']} thread{'s' if document['threads'] > 1 else ''}"
    batch = f", batch {config['batch']}" if config["batch"] > 1 else ""
    lengths = f"{config['prompt_tokens']} + {config['new_tokens']} tokens"
    return f"{candidate['folder']} ({candidate['runtime']})\n{lengths}, {threads}{batch}"


def _speed_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for document in documents:
        candidate, baseline = document["candidate"], document["baseline"]
        for metric in ("decode", "prefill"):
            estimate = document[metric]["all_blocks"]
            rows.append(
                (
                    _label(document).replace("\n", ", "),
                    f"{baseline['folder']} ({baseline['runtime']})",
                    metric,
                    f"{candidate[metric]['median_ms']:.4g}",
                    f"{baseline[metric]['median_ms']:.4g}",
                    f"{estimate['ratio']:.2f}x ({estimate['low']:.2f} – {estimate['high']:.2f})",
                    estimate["verdict"],
                )
            )
    headings = ("candidate", "baseline", "", "ms", "baseline, ms", "ratio (95 %)", "verdict")
    return Table(headings, tuple(rows), frozenset({3, 4, 5}))


def _by_sparsity(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Lines of two or more candidates that differ in their zeros and, as far as the records tell, in nothing else."""
    found: dict[str, dict[float, tuple[float, float, float]]] = {}
    for document in documents:
        candidate, config = document["candidate"], document["config"]
        model = candidate["model"]
        if "sparsity_fraction" not in model:
            continue
        name = (
            f"{model.get('values') or 'fp32'} ({candidate['runtime']}), {document['threads']} threads, batch "
            f"{config['batch']}, {config['prompt_tokens']} + {config['new_tokens']} tokens"
        )
        zeros = 100.0 * model["sparsity_fraction"]
        found.setdefault(name, {})[zeros] = zeros, candidate["decode"]["median_ms"], candidate["decode"]["mad_ms"]
    return {name: sorted(points.values()) for name, points in found.items() if len(points) > 1}


def _size_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    rows: dict[tuple[str, ...], None] = {}
    for document in documents:
        for side in ("candidate", "baseline"):
            engine, model = document[side], document[side]["model"]
            zeros = f"{model['sparsity_fraction']:.1%}" if "sparsity_fraction" in model else "–"
            peak = engine["peak_rss_bytes"]
            rows[
                f"{engine['folder']} ({engine['runtime']})",
                f"{model.get('weights', '–')} {model.get('values') or ''}".strip(),
                zeros,
                f"{engine['model_bytes'] / _MIB:.1f}",
                "–" if peak is None else f"{peak / _MIB:.0f}",
                f"{engine['load_median_ms']:.0f}",
            ] = None
    headings = ("model (engine)", "weights", "zeros", "files, MiB", "peak memory, MiB", "loading, ms")
    return Table(headings, tuple(rows), frozenset({2, 3, 4, 5}))


def _remarks(documents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for document in documents:
        for note in bench_notes(document):
            yield f"{_label(document).splitlines()[0]}: {note}"


def _machine_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    rows: dict[tuple[str, str], None] = {}
    for document in documents:
        machine = document["machine"]
        memory = machine["memory_bytes"]
        facts = {
            "processor": machine["cpu_model"],
            "virtual": {True: "yes", False: "no", None: "unknown"}[machine["virtual"]],
            "processors we may use": str(machine["affinity_cpus"]),
            "memory": "unknown" if memory is None else f"{memory / 2**30:.1f} GiB",
            "system": f"{machine['system']} {machine['kernel']}",
            "versions": ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
            "source": machine["git_revision"] or "unknown",
            "measured": document["created_utc"],
        }
        for side in ("candidate", "baseline"):
            engine = document[side]["engine"]
            kernel = f", kernel {engine['kernel_row']}" if engine["kernel_row"] else ""
            rows[(f"engine of {document[side]['folder']}", f"{engine['engine']} {engine['version']}{kernel}")] = None
        rows |= dict.fromkeys(facts.items())
    return Table(("", ""), tuple(sorted(rows)))


def _command(document: Mapping[str, Any]) -> str:
    config = document["config"]
    return (
        f"losa bench {config['candidate']} --against {config['baseline']} --runtime {config['candidate_runtime']} "
        f"--against-runtime {config['baseline_runtime']} --threads {document['threads']} --batch {config['batch']} "
        f"--prompt {config['prompt_tokens']} --gen {config['new_tokens']} --answers {config['answers']} "
        f"--max-time {config['max_seconds']:g}s"
    )


def _rounds_table(run: RunSource) -> Table:
    rows = []
    for record in run.rounds:
        first, last = record.loss_first, record.loss_last
        rows.append(
            (
                str(record.round_number),
                f"{record.target_sparsity:.1%}",
                f"{record.sparsity_fraction:.2%}",
                f"{record.tokens:,}",
                "–" if first is None else f"{first:.3f}",
                "–" if last is None else f"{last:.3f}",
                f"{record.prune_seconds:.0f}",
                f"{record.tune_seconds:.0f}",
                f"{record.peak_memory_bytes / _MIB:.0f}",
            )
        )
    headings = (
        "round",
        "zeros asked",
        "zeros",
        "tokens",
        "loss, first",
        "last",
        "pruning, s",
        "tuning, s",
        "MiB, peak",
    )
    return Table(headings, tuple(rows), frozenset(range(len(headings))))


def _markdown(sections: Sequence[Section]) -> str:
    lines = ["# Report"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        if section.text:
            lines += ["", section.text]
        if section.table is not None:
            lines += ["", section.table.markdown()]
        if section.lines:
            lines += ["", *(f"- {line}" for line in section.lines)]
        if section.commands:
            lines += ["", "```", *section.commands, "```"]
    return "\n".join(lines) + "\n"


def _page(sections: Sequence[Section], sources: Sources) -> str:
    parts = []
    for section in sections:
        parts.append(f"<section>\n<h2>{escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>")
        if section.figure is not None:
            parts.append(f'<figure role=img aria-label="{escape(section.title, quote=True)}">{section.figure}</figure>')
        if section.table is not None:
            parts.append(section.table.html())
        if section.lines:
            parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in section.lines) + "</ul>")
        if section.commands:
            parts.append(f"<pre class=wide>{escape(chr(10).join(section.commands))}</pre>")
        parts.append("</section>")
    body = "\n".join([*parts, _downloads(sources)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>losa-export report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>losa-export report</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _downloads(sources: Sources) -> str:
    """The records themselves, inside the page."""
    items = []
    for number, source in enumerate(sources.benches, start=1):
        data = base64.b64encode(json.dumps(source.document).encode()).decode("ascii")
        name = escape(f"{number}-{source.file.name}", quote=True)
        items.append(f'<li><a download="{name}" href="data:application/json;base64,{data}">{name}</a></li>')
    return f"<section><h2>Raw data</h2><ul>{''.join(items)}</ul></section>" if items else ""


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; max-width: 46rem; overflow-x: auto; }
figure svg { width: 100%; min-width: 34rem; height: auto; }
.wide { overflow-x: auto; } pre { font-size: 0.85rem; }
td:first-child { min-width: 9rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #8a8f9855; text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
li { overflow-wrap: anywhere; }
@media print {
  body { color-scheme: light; }
  .wide { overflow: visible; } pre { white-space: pre-wrap; }
  table { font-size: 0.7rem; } figure svg { min-width: 0; } section { break-inside: avoid-page; }
}
"""
