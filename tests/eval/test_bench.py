from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from losa_export.errors import BenchmarkError, ConfigError, InputError
from losa_export.eval import bench as bench_module
from losa_export.eval import worker
from losa_export.eval.answer_check import choose_mode, source_digest
from losa_export.eval.bench import BenchConfig, bench, compare_sides, mark_disturbed
from losa_export.eval.bench_report import SCHEMA_VERSION, read_bench
from losa_export.eval.machine import machine_record
from losa_export.eval.other_load import CpuTimes
from losa_export.eval.parity import GateThresholds, thresholds_for
from losa_export.eval.report import bench_markdown, bench_notes, bench_rows, print_bench
from losa_export.eval.stats import Verdict
from losa_export.eval.worker import EngineSession, RawSample
from losa_export.runtimes.base import RuntimeDescription


class LocalEngine:
    """An engine in this process, over a fake runtime."""

    pid = None

    def __init__(self, label, load, journal):
        self.label = label
        self.session = EngineSession(load)
        self.journal = journal
        self.closed = False

    def call(self, command, **arguments):
        self.journal.append((self.label, command))
        value = getattr(self.session, command)(**arguments)
        self.session.rest()
        return value

    def close(self):
        self.closed = True


@pytest.fixture
def folders(tmp_path):
    found = []
    for name, content in (("sparse", b"12345"), ("dense", b"1234567890")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        (folder / "tokenizer.json").write_bytes(b"{}")
        found.append(folder)
    return found


@pytest.fixture
def run(fake_runtime, folders, monkeypatch):
    """Runs a benchmark over fakes: `models` maps (folder name, runtime name) to changes of the fake."""
    record = machine_record()
    # What these tests are not about, and what would take a second in each.
    monkeypatch.setattr(worker, "spin_probe", lambda: (0.002,))
    monkeypatch.setattr(worker, "settle", lambda: None)
    monkeypatch.setattr(worker, "gc", SimpleNamespace(collect=lambda: 0, disable=lambda: None, enable=lambda: None))
    monkeypatch.setattr(bench_module, "machine_record", lambda: record)
    monkeypatch.setattr(bench_module, "read_cpu_times", lambda pids, cpus: None)

    def run(models=None, fail=None, passed=None, **options):
        journal, engines = [], []

        def load(name, folder, threads):
            changes = (models or {}).get((folder.name, name), {})
            runtime = fake_runtime(name=name, **changes)
            runtime.describe = lambda: RuntimeDescription(
                name, "fake", "1.0", threads, "scalar" if name == "ort" else None, {"model.onnx": 5}
            )
            return runtime

        def launch(label, _):
            engines.append(LocalEngine(label, load, journal))
            if fail:
                engines[-1].call = fail(engines[-1].call)
            return engines[-1]

        fixed = {"prompt_tokens": 4, "new_tokens": 3, "min_blocks": 6, "max_blocks": 6, "min_seconds": 0.0}
        fixed |= {"max_warmup_blocks": 2, "load_samples": 1, "threads": 1}
        config = BenchConfig(folders[0], folders[1], **(fixed | options))
        try:
            report = bench(config, launch=launch, passed=passed, show_progress=False)
            return SimpleNamespace(report=report, journal=journal)
        finally:
            assert all(engine.closed for engine in engines)

    return run


def test_the_report_is_a_documented_document_with_every_raw_sample(run, tmp_path):
    report = run().report
    report.write(tmp_path / "bench.json")
    document = read_bench(tmp_path / "bench.json")
    assert document["schema_version"] == SCHEMA_VERSION
    assert len(document["samples"]) == 24
    assert {len(sample["decode_ms"]) for sample in document["samples"]} == {3}
    assert document["candidate"]["engine"]["kernel_row"] == "scalar"
    assert document["candidate"]["files"][0]["name"] == "model.onnx"
    assert len(document["candidate"]["files"][0]["sha256"]) == 64
    assert document["decode"]["all_blocks"]["blocks"] == 6
    assert document["machine"]["python"].startswith("3.")
    assert str(tmp_path) not in json.dumps(document)


def test_a_machine_that_works_for_others_gets_no_verdict(run, monkeypatch):
    times = iter([CpuTimes(100.0, 0.0, 50.0), CpuTimes(1e6, 1.0, 50.0)])
    monkeypatch.setattr(bench_module, "read_cpu_times", lambda pids, cpus: next(times))
    document = run().report.as_dict()
    for metric in ("prefill", "decode"):
        assert document[metric]["all_blocks"]["verdict"] == "NO VERDICT"
        assert document[metric]["all_blocks"]["ratio"] > 0
    assert document["other_load"]["others"] > 0.1
    assert document["warnings"][0].startswith("other processes took ")
    assert "no verdict is given; stop them and run again" in document["warnings"][0]


def test_engines_alternate_in_blocks_of_a_b_b_a(run):
    journal = run().journal
    order = ["A" if "candidate" in label else "B" for label, command in journal if command == "sample"]
    assert "".join(order).startswith("ABBA" * 6)
    assert len(order) % 4 == 0


def test_answers_are_checked_before_anything_is_timed(run):
    commands = [command for _, command in run().journal]
    assert commands.index("gate") < commands.index("sample")
    assert commands.index("workload_logits") < commands.index("sample")


def test_answers_that_differ_end_the_benchmark_before_timing(run):
    with pytest.raises(
        BenchmarkError, match=r"nothing was timed, since the answers differ from the baseline.*--answers own"
    ):
        run({("sparse", "ort"): {"seed": 1}})


def disturb_the_timed_prompt(kind, row, state, logits):
    if kind == "prefill" and len(logits) == 40:
        logits[-1, 3] += 5
    return logits


def test_an_error_that_only_the_timed_prompt_shows_is_found(run):
    where = r"differs from the baseline.* on the prompt to be timed, in 1 of 17 positions, of which 0 may"
    with pytest.raises(BenchmarkError, match=where):
        run({("sparse", "ort"): {"disturb": disturb_the_timed_prompt}}, prompt_tokens=40)


def test_one_stray_of_the_timed_prompt_is_let_pass_where_thresholds_do(run):
    few = GateThresholds(stray_share=0.1)
    result = run({("sparse", "ort"): {"disturb": disturb_the_timed_prompt}}, prompt_tokens=40, thresholds=few)
    assert result.report.answers.candidate.workload.kl_max > few.max_kl


def test_different_models_are_each_checked_by_a_second_engine(run):
    other = {"seed": 1}
    result = run({("sparse", "ort"): other, ("sparse", "ort-stock"): other}, answers="own")
    answers = result.report.answers
    assert (answers.mode, answers.decided_by) == ("own", "option")
    assert answers.candidate.against == "the same files in ort-stock"
    assert answers.baseline.against == "the same files in ort"
    assert any("to check" in label for label, _ in result.journal)


def test_answers_that_an_engine_has_passed_are_not_asked_for_again(run):
    passed = {}
    first = run(answers="own", passed=passed)
    again = run(answers="own", passed=passed)
    assert "gate" in [command for _, command in first.journal]
    assert not {"gate", "answers", "workload_logits"} & {command for _, command in again.journal}
    assert not any("to check" in label for label, _ in again.journal)
    assert again.report.answers == first.report.answers


def test_the_other_side_of_an_earlier_benchmark_is_checked_already(run):
    passed = {}
    run(answers="own", passed=passed)
    turned = {"candidate_runtime": "ort-stock", "baseline_runtime": "ort-stock"}
    journal = run(answers="own", passed=passed, **turned).journal
    assert [label for label, command in journal if command == "gate"] == ["the candidate ('sparse' in ort-stock)"]


@pytest.mark.parametrize("change", ["file", "runtime", "tokens", "thresholds"])
def test_what_an_answer_depends_on_makes_it_be_asked_for_again(run, folders, change):
    passed = {}
    run(answers="own", passed=passed)
    options = {
        "file": {},
        "runtime": {"candidate_runtime": "genai"},
        "tokens": {"seed": 1},
        "thresholds": {"thresholds": GateThresholds(max_kl=1e-6)},
    }[change]
    if change == "file":
        (folders[0] / "model.onnx").write_bytes(b"54321")
    with pytest.raises(BenchmarkError, match=r"answers differ from the same files in ort-stock"):
        run({("sparse", "ort-stock"): {"seed": 1}}, answers="own", passed=passed, **options)


def test_answers_that_failed_are_asked_for_again(run):
    passed = {}
    for _ in range(2):
        with pytest.raises(BenchmarkError, match=r"answers differ from the same files in ort-stock"):
            run({("sparse", "ort-stock"): {"seed": 1}}, answers="own", passed=passed)


def test_a_second_engine_that_disagrees_ends_the_benchmark(run):
    with pytest.raises(BenchmarkError, match=r"answers differ from the same files in ort-stock"):
        run({("sparse", "ort-stock"): {"seed": 1}}, answers="own")


def test_a_checkpoint_in_torch_is_its_own_definition(run):
    report = run(answers="own", baseline_runtime="torch").report
    assert report.answers.baseline is None
    assert report.answers.candidate is not None


def test_other_vocabularies_cannot_be_the_same_model(run):
    with pytest.raises(BenchmarkError, match=r"vocabulary of 11.* one of 12: they are different models"):
        run({("dense", "ort-stock"): {"vocab_size": 12}})


def test_a_prompt_beyond_the_positions_is_refused(run):
    with pytest.raises(ConfigError, match=r"need 513 positions, but a model here has 512"):
        run(prompt_tokens=510)


def test_each_load_has_an_engine_of_its_own(run):
    result = run(load_samples=3)
    assert len(result.report.candidate.load_ms) == 3
    assert [command for _, command in result.journal].count("load") == 6


def test_engines_are_closed_when_the_user_interrupts(run):
    def fail(call):
        def interrupted(command, **arguments):
            if command == "sample":
                raise KeyboardInterrupt
            return call(command, **arguments)

        return interrupted

    with pytest.raises(KeyboardInterrupt):
        run(fail=fail)  # the fixture asserts that every engine was closed


def test_a_missing_folder_is_named(folders, tmp_path):
    with pytest.raises(InputError, match=r"candidate folder '.*absent' does not exist"):
        bench(BenchConfig(tmp_path / "absent", folders[1]), show_progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidate_runtime": "tract"}, r"candidate_runtime is 'tract'"),
        ({"answers": "maybe"}, r"answers is 'maybe'"),
        ({"prompt_tokens": 0}, r"prompt_tokens is 0"),
        ({"new_tokens": 1.5}, r"new_tokens is 1\.5"),
        ({"min_blocks": 3}, r"min_blocks is 3; give a whole number of at least 6"),
        ({"max_blocks": 5}, r"max_blocks is 5; give a whole number of at least 8"),
        ({"load_samples": 0}, r"load_samples is 0"),
        ({"precision": 0.0}, r"precision is 0\.0"),
        ({"max_seconds": float("nan")}, r"max_seconds is nan"),
        ({"min_seconds": 500.0}, r"min_seconds is 500\.0; give a number from 0 to max_seconds \(180\)"),
    ],
)
def test_options_out_of_range_name_the_field(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        BenchConfig(tmp_path, tmp_path, **options)


def test_the_mode_follows_the_digests_of_the_source_weights(folders):
    assert choose_mode("auto", *folders) == ("same", "default")
    assert choose_mode("own", *folders) == ("own", "option")
    for folder, digest in zip(folders, ("aa", "bb"), strict=True):
        (folder / "export.json").write_text(json.dumps({"source": {"weights_sha256": digest}}))
    assert choose_mode("auto", *folders) == ("own", "weights digest")
    assert choose_mode("auto", folders[0], folders[0]) == ("same", "weights digest")


def test_exports_that_round_differently_have_own_answers(tmp_path):
    folders = []
    for name, types in (("exact", ("fp32", "fp32", None)), ("coarse", ("int8", "int8", 128)), ("plain", (None,) * 3)):
        folder = tmp_path / name
        folder.mkdir()
        record = {"source": {"weights_sha256": "same"}, **dict(zip(("values", "head", "group"), types, strict=True))}
        (folder / "export.json").write_text(json.dumps(record))
        folders.append(folder)
    exact, coarse, plain = folders
    assert choose_mode("auto", coarse, exact) == ("own", "value types")
    assert choose_mode("auto", coarse, coarse) == ("same", "weights digest")
    assert choose_mode("auto", exact, plain) == ("same", "weights digest")


def test_rounded_activations_loosen_what_counts_as_the_same():
    exact, fine, rough = (thresholds_for(name) for name in (None, "int16", "int8"))
    assert exact == GateThresholds()
    assert exact.max_relative_error < fine.max_relative_error < rough.max_relative_error < float("inf")
    assert exact.max_kl < fine.max_kl < rough.max_kl
    assert exact.strays(48) == fine.strays(48) == 0
    assert [rough.strays(positions) for positions in (1, 3, 12, 48)] == [0, 1, 1, 6]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"source": 3}', '{"source": {"weights_sha256": 3}}'])
def test_a_manifest_without_a_digest_decides_nothing(folders, text):
    (folders[0] / "export.json").write_text(text)
    assert source_digest(folders[0]) is None


def raw(prefill, decode, probe=0.002):
    return RawSample(prefill, (decode, decode), (probe,), 0.0, 0.0, 1.0, 0)


def synthetic(ratio=2.0, slow_probe=()):
    """Eight blocks; the candidate takes 1 s, the baseline `ratio` s, give or take a little."""
    random = np.random.default_rng(0)
    found = []
    for block in range(8):
        for side in ("candidate", "baseline", "baseline", "candidate"):
            seconds = (ratio if side == "baseline" else 1.0) * random.normal(1, 0.01)
            found.append((side, block, raw(seconds, seconds, 0.003 if block in slow_probe else 0.002)))
    return mark_disturbed(found)


def test_a_baseline_of_twice_the_time_makes_the_candidate_twice_as_fast(tmp_path):
    comparison = compare_sides(synthetic(), lambda sample: sample.decode_mean_ms)
    assert comparison.all_blocks.low < 2.0 < comparison.all_blocks.high
    assert comparison.all_blocks.verdict is Verdict.FASTER
    assert comparison.quiet_blocks == comparison.all_blocks


def test_a_slow_spin_flags_the_sample_and_its_block_is_left_out_of_the_quiet_ratio(tmp_path):
    samples = synthetic(slow_probe=(2, 5))
    assert {sample.block for sample in samples if sample.disturbed} == {2, 5}
    comparison = compare_sides(samples, lambda sample: sample.prefill_ms)
    assert comparison.all_blocks.blocks == 8
    assert comparison.quiet_blocks.blocks == 6


def test_too_few_quiet_blocks_give_no_quiet_ratio(tmp_path):
    samples = synthetic(slow_probe=(0, 1, 2, 3, 4))
    # The quiet spin is the tenth percentile, so three quiet blocks of eight still set it.
    comparison = compare_sides(samples, lambda sample: sample.prefill_ms)
    assert comparison.quiet_blocks is None


def document_of(run, **changes):
    document = run().report.as_dict()
    for name in ("prefill", "decode"):
        document[name]["all_blocks"] |= {"ratio": 1.5, "low": 1.4, "high": 1.6, "verdict": "FASTER"}
    return document | changes


def test_the_table_shows_ratio_interval_and_verdict(run):
    rows = {row.metric: row for row in bench_rows(document_of(run))}
    assert rows["decode, per token"].ratio == "1.50x (1.40–1.60)"
    assert rows["decode, per token"].verdict == "FASTER"
    assert "prefill, 4 tokens" in rows
    assert rows["model files"].ratio == "1.00 of it"


def test_markdown_holds_title_table_and_notes(run):
    text = bench_markdown(document_of(run, warnings=["the machine was busy"]))
    assert text.startswith("sparse (ort, kernel scalar) against dense (ort-stock), 1 thread, ")
    assert "| decode, per token |" in text
    assert "- Answers agree: the candidate against the baseline ('dense' in ort-stock): relative error 0.0e+00" in text
    assert "- Warning: the machine was busy." in text


def test_a_difference_not_shown_is_said_with_the_smallest_that_could_be(run):
    document = document_of(run)
    document["decode"]["all_blocks"] |= {"verdict": "NO DIFFERENCE SHOWN", "smallest_shown": 1.0421}
    assert "decode: this run could not have shown a difference smaller than 1.042x." in bench_notes(document)


def test_different_models_are_said_to_differ_by_design(run):
    document = run(answers="own").report.as_dict()
    assert bench_notes(document)[0].startswith("The two hold different weights, so their answers differ by design")
    document["answers"] |= {"candidate": None, "baseline": None}
    assert bench_notes(document)[0].endswith("no second engine can open them.")


def test_the_printed_table_keeps_names_that_look_like_markup(run):
    document = document_of(run)
    document["candidate"]["folder"] = "[red]odd[/red]"
    out = io.StringIO()
    print_bench(document, Console(file=out, width=140))
    assert "[red]odd[/red]" in out.getvalue()
    assert "FASTER" in out.getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not a readable bench\.json"),
        ('{"schema": "losa-bench", "schema_version": 99}', r"schema 'losa-bench' version 99, this version reads"),
        ("[]", r"schema None version None"),
    ],
)
def test_a_document_that_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_bench(tmp_path / "bench.json")


def test_warnings_name_a_busy_machine_and_a_wide_interval(run):
    warnings = run(precision=1e-9, warmup_tolerance=1e-9).report.warnings
    assert any("wider than the" in warning for warning in warnings)
    assert any("warm-up blocks" in warning for warning in warnings)


def test_every_field_of_the_document_is_in_the_schema(run):
    schema = (Path(__file__).resolve().parents[2] / "docs" / "bench-schema.md").read_text(encoding="utf-8")

    def fields(value, within=()):
        if isinstance(value, dict):
            for key, inner in value.items():
                # Options, package names, percentile levels and file names are described where they are made.
                if within[-1:] not in (("packages",), ("percentiles_ms",), ("config",), ("thresholds",)):
                    yield key
                    if key not in ("engine", "greedy"):
                        yield from fields(inner, (*within, key))
        elif isinstance(value, list):
            for inner in value[:1]:
                yield from fields(inner, within)

    missing = {name for name in fields(run().report.as_dict()) if f"`{name}`" not in schema}
    assert missing == set()
