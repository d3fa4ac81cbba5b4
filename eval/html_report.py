"""`losa report`: records of benchmarks, evaluations and training runs as one page that needs nothing else, and as
Markdown.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from losa_export.eval.figure_canvas import check_drawing
from losa_export.eval.report_bench import (
    machine_sections,
    remarks_section,
    size_section,
    sparsity_sections,
    speed_section,
)
from losa_export.eval.report_commands import (
    bench_commands,
    doctor_commands,
    eval_commands,
    report_command,
    train_command,
)
from losa_export.eval.report_evals import eval_sections
from losa_export.eval.report_pareto import pareto_sections
from losa_export.eval.report_parts import Section
from losa_export.eval.report_roofline import roofline_sections
from losa_export.eval.report_sources import Sources, find_sources
from losa_export.eval.report_timings import timings
from losa_export.eval.report_training import run_sections
from losa_export.files import check_output_file, write_bytes_atomic


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
    sections = [*_sections(sources), _rerun_section(sources, places, html)]
    _write(html, _page(sections, sources))
    if markdown is not None:
        _write(markdown, "\n\n".join(["# losa-export report", *(one.markdown() for one in sections)]) + "\n")
    return sources


def _write(path: Path, text: str) -> None:
    # A record may name a folder whose bytes are no text.
    write_bytes_atomic(path, text.encode("utf-8", "replace"))


def _sections(sources: Sources) -> Iterator[Section]:
    timed = timings([source.document for source in sources.benches])
    if timed:
        yield speed_section(sources.benches)
    yield from pareto_sections(timed, sources.benches, sources.evals)
    yield from sparsity_sections(timed, sources.benches)
    yield from roofline_sections(timed, sources.benches, sources.doctors)
    yield from eval_sections(sources.evals)
    if timed:
        yield size_section(timed)
    for number, run in enumerate(sources.runs, start=1):
        yield from run_sections(run, number)
    if timed:
        yield remarks_section(sources.benches)
    machines = [one.document for one in (*sources.benches, *sources.evals) if "machine" in one.document]
    yield from machine_sections(machines, timed)
    if sources.skipped:
        yield Section("Left out", lines=tuple(f"{path.name}: {reason}" for path, reason in sources.skipped))


def _rerun_section(sources: Sources, places: Sequence[Path], html: Path) -> Section:
    commands = (
        *doctor_commands(sources.doctors),
        *bench_commands(sources.benches),
        *eval_commands(sources.evals),
        *(train_command(run) for run in sources.runs),
        report_command(places, html),
    )
    return Section(
        "How to run it again",
        "Records name folders and files by their last names; TASKS and MODEL stand for folders that none names.",
        commands=tuple(dict.fromkeys(commands)),
    )


def _page(sections: Sequence[Section], sources: Sources) -> str:
    body = "\n".join([*(section.html() for section in sections), _downloads(sources)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>losa-export report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>losa-export report</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _downloads(sources: Sources) -> str:
    """The records themselves, byte for byte, inside the page."""
    items = []
    for number, file in enumerate(sources.files, start=1):
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        kind = "application/json" if file.suffix == ".json" else "application/jsonl"
        # All journals bear one name, so that of the run goes before it.
        run = f"{file.resolve().parent.name}-" if file.suffix == ".jsonl" else ""
        name = escape(f"{number}-{run}{file.name}", quote=True)
        items.append(f'<li><a download="{name}" href="data:{kind};base64,{data}">{name}</a></li>')
    return f"<section><h2>Raw data</h2>\n<ul>{''.join(items)}</ul></section>"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
h2, p, li, summary { overflow-wrap: anywhere; }
p { max-width: 46rem; }
figure { margin: 1rem 0; max-width: 46rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
.wide { overflow-x: auto; }
pre { font-size: 0.85rem; }
summary { cursor: pointer; font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #8a8f9855; text-align: left; vertical-align: top; }
th { vertical-align: bottom; }
td { max-width: 22rem; }
.long { min-width: 9rem; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td.line { white-space: nowrap; }
@media print {
  :root { color-scheme: light; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  table { font-size: 0.65rem; }
  th, td { padding: 0.2rem 0.35rem; }
  .long { min-width: 0; }
  td.number, td.line { white-space: normal; }
  figure { max-width: 40rem; overflow: visible; }
  figure svg { min-width: 0; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  /* All commands stand at the end; what else is folded up is printed. */
  .reruns, summary { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
