"""The section of a report that holds decoding against memory: a token cannot come before the weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from losa_export.eval.figure_marks import roofline_figure
from losa_export.eval.report_commands import bench_commands, doctor_commands
from losa_export.eval.report_pareto import timed_mark
from losa_export.eval.report_parts import Section, Table
from losa_export.eval.report_sources import Source
from losa_export.eval.report_timings import Setting, Timed, setting_of

_MIB = 2**20


def roofline_sections(
    timed: Sequence[Timed], benches: Sequence[Source], doctors: Sequence[Source]
) -> Iterator[Section]:
    """A section for each setting whose memory bandwidth is known, and one that names the others."""
    unknown = []
    for setting in dict.fromkeys(one.setting for one in timed):
        measured = [(bandwidth(source, setting), source) for source in doctors]
        known = [(rate, source) for rate, source in measured if rate is not None]
        if not known:
            unknown.append(setting)
            continue
        # A limit: of several examinations the one that read fastest.
        rate, doctor = max(known, key=lambda pair: pair[0])
        here = [one for one in timed if one.setting == setting]
        threads = f"{setting.threads} thread{'s' if setting.threads > 1 else ''}"
        yield Section(
            f"Memory roofline: {setting.work}",
            "Decoding reads the weights in each step, so the least time is their bytes over the memory bandwidth: "
            f"{rate / 1e9:.1f} GB/s, the fastest that losa doctor read with {threads} on such a machine. Bytes are "
            "those of the files: an engine that unpacks weights when loading reads more, and of a table of embeddings "
            "that is stored apart from the head only single rows are read. Above 100 % a part was not read, or came "
            "from a cache.",
            _figure(here, rate),
            (
                *doctor_commands([doctor]),
                *bench_commands([one for one in benches if setting_of(one.document) == setting]),
            ),
            _table(here, rate),
        )
    if unknown:
        yield Section(
            "Memory roofline: not known",
            "No record of losa doctor tells the memory bandwidth of these processors with these numbers of threads.",
            lines=tuple(str(setting) for setting in unknown),
            commands=tuple(
                f"losa doctor --threads {threads} --json doctor-{threads}.json"
                for threads in dict.fromkeys(setting.threads for setting in unknown)
            ),
        )


def _figure(timed: Sequence[Timed], rate: float) -> str:
    marks = [
        timed_mark(one, one.model.model_bytes / _MIB, one.decode.middle, filled=True, whisker=False) for one in timed
    ]
    label = f"files read once at {rate / 1e9:.1f} GB/s"
    return roofline_figure(marks, rate / 1e3, label, salt=str(timed[0].setting))


def bandwidth(source: Source, setting: Setting) -> float | None:
    """Bytes a second that a setting's threads read, by an examination; None if it was of another machine or number."""
    document = source.document
    machine = document["machine"]
    if (machine["cpu_model"], machine["physical_cores"]) != (setting.processor, setting.cores):
        return None
    if setting.threads == document["threads"]:
        # A limit is what can be reached: the fastest reading, not the middle one.
        return float(max([document["bandwidth_all"], *document["bandwidth_samples"]]))
    return float(document["bandwidth_one"]) if setting.threads == 1 else None


def _table(timed: Sequence[Timed], rate: float) -> Table:
    rows = []
    for one in sorted(timed, key=lambda one: one.decode.middle):
        limit = 1e3 * one.model.model_bytes / rate
        rows.append(
            (
                str(one.model.number),
                one.model.name,
                f"{one.model.model_bytes / _MIB:.1f}",
                f"{limit:.3g}",
                one.decode.text,
                f"{limit / one.decode.middle:.0%}",
            )
        )
    headings = ("", "model (engine)", "files, MiB", "least, ms", "measured, ms", "of the bandwidth")
    return Table(headings, tuple(rows), frozenset({0, 2, 3, 4, 5}))
