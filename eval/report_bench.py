"""The sections of a report that benchmarks alone make: speed, time against zeros, size and memory, the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from losa_export.eval.figures import ratio_figure, sparsity_figure
from losa_export.eval.report import bench_notes
from losa_export.eval.report_commands import bench_commands
from losa_export.eval.report_parts import Section, Table
from losa_export.eval.report_sources import Source
from losa_export.eval.report_timings import Metric, Model, Setting, Spread, Timed, setting_of

_MIB = 2**20
_METRICS: tuple[Metric, ...] = ("decode", "prefill")
WHISKERS = (
    "Whiskers are a run's median absolute deviation around its median, and span those of all runs where several timed "
    "the same."
)
_TIMES: Mapping[Metric, str] = {"decode": "decode, ms a token", "prefill": "prefill, ms"}


def speed_section(sources: Sequence[Source]) -> Section:
    """The headline: each candidate against its baseline, with the verdicts."""
    documents = [source.document for source in sources]
    settings = dict.fromkeys(map(setting_of, documents))
    labels = [_name(one["candidate"]) + (f"\n{setting_of(one).work}" if len(settings) > 1 else "") for one in documents]
    table, same = _speed_table(documents).without_constant(1, 2)
    shared = "".join(f" Every {heading}: {value}." for heading, value in same.items())
    return Section(
        "Speed",
        "Ratios are times of the baseline over those of the candidate, taken in turns in one run: above 1 the "
        "candidate is faster. The verdict is FASTER or SLOWER only if the whole interval lies on one side of 1. Times "
        "are medians, of decoding those of a token, of prefill those of the prompt." + shared,
        ratio_figure(labels, {metric: [one[metric]["all_blocks"] for one in documents] for metric in _METRICS}),
        bench_commands(sources),
        table,
    )


def _speed_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for document in documents:
        candidate, baseline = document["candidate"], document["baseline"]
        for metric in _METRICS:
            estimate = document[metric]["all_blocks"]
            rows.append(
                (
                    _name(candidate),
                    str(setting_of(document)),
                    _name(baseline),
                    metric,
                    f"{candidate[metric]['median_ms']:.4g}",
                    f"{baseline[metric]['median_ms']:.4g}",
                    f"{estimate['ratio']:.2f}x ({estimate['low']:.2f} – {estimate['high']:.2f})",
                    estimate["verdict"],
                )
            )
    headings = ("candidate", "run", "baseline", "", "ms", "baseline, ms", "ratio (95 %)", "verdict")
    return Table(headings, tuple(rows), frozenset({4, 5, 6}))


def sparsity_sections(timed: Sequence[Timed], sources: Sequence[Source]) -> Iterator[Section]:
    """Time against zeros, for each setting in which two models differ in their zeros and in nothing else known."""
    for setting in dict.fromkeys(one.setting for one in timed):
        here = [one for one in timed if one.setting == setting]
        lines: dict[str, dict[float, Timed]] = {}
        for one in here:
            if one.model.zeros is not None:
                name = f"{one.model.values} ({one.model.runtime})"
                lines.setdefault(name, {})[100.0 * one.model.zeros] = one
        lines = {name: dict(sorted(points.items())) for name, points in lines.items() if len(points) > 1}
        if lines:
            drawn = [one for points in lines.values() for one in points.values()]
            levels = [one for one in here if one.is_baseline and one not in drawn]
            unknown = [one.model for one in here if one.model.weights == "sparse" and one.model.zeros is None]
            yield Section(
                f"Time against zeros: {setting.work}",
                f"On {setting.processor}. A line holds models of one type of values in one engine, which differ in "
                f"their zeros. {WHISKERS} Baselines beside them are horizontal lines."
                + (f" Without a place, since export.json tells no zeros: {_listed(unknown)}." if unknown else ""),
                _sparsity_figure(lines, levels, setting),
                bench_commands([one for one in sources if setting_of(one.document) == setting]),
                _sparsity_table(lines, levels),
            )


def _ends(spread: Spread) -> tuple[float, float, float]:
    return spread.middle, spread.low, spread.high


def _sparsity_figure(lines: Mapping[str, Mapping[float, Timed]], levels: Sequence[Timed], setting: Setting) -> str:
    panels = {
        _TIMES[metric]: {
            name: [(zeros, *_ends(one.spread(metric))) for zeros, one in points.items()]
            for name, points in lines.items()
        }
        for metric in _METRICS
    }
    across = {
        _TIMES[metric]: {f"{one.model.name}, baseline": one.spread(metric).middle for one in levels}
        for metric in _METRICS
    }
    return sparsity_figure(panels, across, salt=str(setting))


def _listed(models: Sequence[Model]) -> str:
    return ", ".join(dict.fromkeys(model.name for model in models))


def _sparsity_table(lines: Mapping[str, Mapping[float, Timed]], levels: Sequence[Timed]) -> Table:
    rows = [
        (name, one.model.folder, f"{zeros:.1f} %", one.decode.text, one.prefill.text)
        for name, points in lines.items()
        for zeros, one in points.items()
    ]
    rows += [
        (f"baseline ({one.model.runtime})", one.model.folder, "–", one.decode.text, one.prefill.text) for one in levels
    ]
    return Table(("values (engine)", "model", "zeros", *_TIMES.values()), tuple(rows), frozenset({2, 3, 4}))


def size_section(timed: Sequence[Timed]) -> Section:
    """What each model takes on disk and in memory, under each setting."""
    rows = []
    for one in timed:
        model = one.model
        rows.append(
            (
                str(model.number),
                model.name,
                " ".join(filter(None, (model.weights, model.values))),
                "–" if model.zeros is None else f"{model.zeros:.1%}",
                f"{model.model_bytes / _MIB:.1f}",
                "–" if one.peak_rss_bytes is None else f"{one.peak_rss_bytes / _MIB:.0f}",
                f"{one.load_ms:.0f}",
                one.setting.work,
            )
        )
    headings = ("", "model (engine)", "weights", "zeros", "files, MiB", "peak memory, MiB", "loading, ms", "run")
    table, same = Table(headings, tuple(rows), frozenset({0, 3, 4, 5, 6})).without_constant(7)
    return Section(
        "Size, memory and loading",
        "Files are graph and weights. Peak memory is the largest that the engine's process had resident. Models are "
        "told apart by the SHA-256 of the files that the engine read, whatever their folder is called."
        + "".join(f" Every run: {value}." for value in same.values()),
        table=table,
    )


def remarks_section(sources: Sequence[Source]) -> Section:
    """How each answer was checked, and the warnings of each run."""
    lines = []
    for source in sources:
        document = source.document
        several = len({setting_of(one.document) for one in sources}) > 1
        name = _name(document["candidate"]) + (f", {setting_of(document).work}" if several else "")
        lines += [f"{name}: {note}" for note in bench_notes(document)]
    return Section("What was checked, and what to mind", lines=tuple(dict.fromkeys(lines)))


def machine_sections(documents: Sequence[Mapping[str, Any]], timed: Sequence[Timed]) -> Iterator[Section]:
    """What all of it ran on, and the engines."""
    facts: dict[str, dict[str, None]] = {}
    for document in documents:
        machine = document["machine"]
        memory = machine["memory_bytes"]
        for name, value in {
            "processor": f"{machine['cpu_model']}, {machine['physical_cores']} cores",
            "virtual": {True: "yes", False: "no", None: "unknown"}[machine["virtual"]],
            "caches": ", ".join(
                f"L{cache['level']} {cache['size_bytes'] >> 10} KiB"
                for cache in machine.get("caches", ())
                if cache["kind"] != "Instruction"
            ),
            "frequency governor": machine.get("governor") or "unknown",
            "processors we may use": str(machine["affinity_cpus"]),
            "memory": "unknown" if memory is None else f"{memory / 2**30:.1f} GiB",
            "system": f"{machine['system']} {machine['kernel']}",
            "versions": ", ".join(f"{package} {version}" for package, version in machine["packages"].items()),
            "source": machine["git_revision"] or "unknown",
        }.items():
            facts.setdefault(name, {})[value] = None
    rows = [(name, "; ".join(filter(None, values))) for name, values in facts.items()]
    measured = sorted(document["created_utc"] for document in documents if "created_utc" in document)
    if measured:
        rows.append(("benchmarks", " to ".join(dict.fromkeys((measured[0], measured[-1])))))
    yield Section("Machine", table=Table(("", ""), tuple(rows)))
    if timed:
        models = dict.fromkeys(one.model for one in timed)
        yield Section(
            "Engines and files",
            "SHA-256 is that of the largest file the engine read; all are in the records.",
            table=Table(
                ("", "model", "runtime", "engine", "SHA-256 begins"),
                tuple((str(one.number), one.folder, one.runtime, one.engine, one.fingerprint or "–") for one in models),
                frozenset({0}),
            ),
        )


def _name(side: Mapping[str, Any]) -> str:
    return f"{side['folder']} ({side['runtime']})"
