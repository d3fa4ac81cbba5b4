"""`losa demo`: the whole data path on one model, each step skipped when its result is already there.

Every result is a folder or file that appears under its final name only when it is complete, so an
interrupted demo goes on where it stopped, in the midst of training as well.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from losa_export.embedded import TextParts, write_embedded_model, write_embedded_text, write_user_text
from losa_export.errors import ConfigError, OutputError
from losa_export.files import check_output, write_text_atomic
from losa_export.sources import resolve_model

RECORD_FILE = "demo.json"


@dataclass(frozen=True)
class DemoEffort:
    """How much time the demo takes where time buys quality.

    Attributes:
        train_seconds: pruning rounds and tuning together.
        rounds: prune-then-tune rounds.
        calibration_windows: windows of `window` tokens for the activation statistics of a round.
        window: tokens in a window of calibration and tuning.
        batch_size: windows in an optimizer step.
        learning_rate: its peak.
        perplexity_windows, perplexity_window: validation text that is scored.
        bench_seconds: timed part of each of the two benchmarks, at most.
        warmup_blocks: untimed blocks before it, at most.
    """

    train_seconds: float
    rounds: int
    calibration_windows: int
    window: int
    batch_size: int
    learning_rate: float
    perplexity_windows: int
    perplexity_window: int
    bench_seconds: float
    warmup_blocks: int


# Few rounds and small steps: with some ten thousand tokens of tuning, updates are what is scarce.
FULL = DemoEffort(
    train_seconds=540.0,
    rounds=3,
    calibration_windows=16,
    window=256,
    batch_size=2,
    learning_rate=2e-3,
    perplexity_windows=24,
    perplexity_window=512,
    bench_seconds=90.0,
    warmup_blocks=6,
)
QUICK = DemoEffort(
    train_seconds=60.0,
    rounds=2,
    calibration_windows=8,
    window=256,
    batch_size=2,
    learning_rate=2e-3,
    perplexity_windows=8,
    perplexity_window=256,
    bench_seconds=15.0,
    warmup_blocks=2,
)


@dataclass(frozen=True)
class DemoConfig:
    """What to demonstrate.

    Attributes:
        output: folder for everything that is made.
        model: checkpoint folder or hub id; None is the embedded SmolLM2-135M-Instruct.
        texts: files that replace the embedded Wikipedia paragraphs.
        sparsity_fraction: zeros among the block linears, strictly between 0 and 1.
        quick: a short version of everything.
        threads: of the engines; None is what the machine offers.
        overwrite: start anew in a folder that is not empty.
        effort: None is `QUICK` or `FULL`.
    """

    output: Path
    model: str | None = None
    texts: tuple[Path, ...] = ()
    sparsity_fraction: float = 0.5
    quick: bool = False
    threads: int | None = None
    overwrite: bool = False
    effort: DemoEffort | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity_fraction < 1.0:
            raise ConfigError(
                f"sparsity is {self.sparsity_fraction}; it must lie strictly between 0 and 1, for example 0.5",
                field="sparsity_fraction",
            )

    @property
    def chosen_effort(self) -> DemoEffort:
        """The effort that `quick` or `effort` asks for."""
        return self.effort or (QUICK if self.quick else FULL)

    def identity(self) -> dict[str, Any]:
        """What results depend on: a demo goes on only with the same."""
        return {
            "model": self.model,
            "texts": [str(path.resolve()) for path in self.texts],
            "sparsity_fraction": self.sparsity_fraction,
            "effort": asdict(self.chosen_effort),
        }


@dataclass(frozen=True)
class DemoRow:
    """One model of the closing table. Speed-ups are dense time over this model's time: (ratio, low, high)."""

    name: str
    perplexity: float
    model_bytes: int
    decode: tuple[float, float, float] | None
    prefill: tuple[float, float, float] | None


@dataclass(frozen=True)
class DemoReport:
    """Outcome of the demo: the table, and where everything lies."""

    config: DemoConfig
    rows: tuple[DemoRow, ...]
    threads: int
    seconds: float

    def __str__(self) -> str:
        """The table, the files and the commands to try next."""
        effort, output = self.config.chosen_effort, self.config.output
        headings = ("", "perplexity", "file", "decode", "prefill (128 tokens)")
        cells = [headings, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
        lines = [
            f"{self.config.sparsity_fraction:.0%} zeros, fp32 values, ONNX Runtime on {self.threads} "
            f"{'thread' if self.threads == 1 else 'threads'}; finished in {self.seconds / 60:.1f} min",
            "",
        ]
        for line in cells:
            first, *rest = line
            lines.append(
                "  ".join(
                    [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))]
                )
            )
        lines += [
            "",
            f"perplexity: {effort.perplexity_windows} windows of {effort.perplexity_window} tokens of validation text,"
            " measured on the exported file",
            "decode, prefill: dense time over this model's, median ratio and 95 % interval of paired blocks in one run",
            "",
            f"dense checkpoint   {output / 'dense'}",
            f"masks, adapters    {output / 'run'}",
            f"merged checkpoint  {output / 'merged'}",
            f"sparse ONNX        {output / 'onnx'}",
            f"measurements       {output / 'bench.json'}",
            "",
            "Try next:",
            f'  {_program("losa")} generate {output / "onnx"} "Tell me about the sea."',
            f"  {_program('losa-export')} {output / 'merged'} --format onnx -o {output / 'again'}",
            f"  {_program('losa')} bench {output / 'onnx'} --against {output / 'dense-onnx'}",
        ]
        return "\n".join(lines)

    def _cells(self, row: DemoRow) -> tuple[str, ...]:
        dense = self.rows[0].model_bytes
        size = f"{row.model_bytes / 1e6:.0f} MB ({row.model_bytes / dense:.2f}x)"
        return (row.name, f"{row.perplexity:.2f}", size, _ratio_cell(row.decode), _ratio_cell(row.prefill))

    def as_dict(self) -> dict[str, Any]:
        """The rows as plain JSON values."""
        return {"rows": [asdict(row) for row in self.rows], "threads": self.threads, "seconds": self.seconds}


def _program(name: str) -> str:
    """How the user can call one of our commands: by its name where the shell finds it, else by its path."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) is not None or not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def _ratio_cell(estimate: tuple[float, float, float] | None) -> str:
    if estimate is None:
        return "1"
    ratio, low, high = estimate
    return f"{ratio:.2f}x ({low:.2f}–{high:.2f})"


def run_demo(config: DemoConfig) -> DemoReport:
    """Go the whole path, or the rest of it.

    Raises:
        OutputError: the folder holds something else, or a demo of other settings, and `overwrite` is off.
        KeyboardInterrupt: interrupted; calling again goes on.
        Any LosaError of the steps.
    """
    _open_output(config)
    return _Demo(config).run()


def _open_output(config: DemoConfig) -> None:
    """Make the folder, or check that what lies there is a part of the same demo."""
    record = config.output / RECORD_FILE
    wanted = config.identity()
    if not config.overwrite and record.is_file():
        if _read_record(record).get("config") == wanted:
            return
        raise OutputError(
            f"'{config.output}' holds a demo of other settings; choose another folder with -o, or start anew with "
            "--overwrite",
            path=config.output,
        )
    sources = [Path(config.model)] if config.model and Path(config.model).is_dir() else []
    check_output(config.output, overwrite=config.overwrite, inputs=[*sources, *config.texts])
    if config.output.is_dir():
        shutil.rmtree(config.output)
    config.output.mkdir(parents=True)
    write_text_atomic(record, json.dumps({"config": wanted}, indent=2) + "\n")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


class _Demo:
    """The steps in order. Each is told once on stderr, whether done now or found done."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.effort = config.chosen_effort
        self.out = config.output
        self._step = 0

    def run(self) -> DemoReport:
        start = time.monotonic()
        parts = self._texts()
        dense = self._dense()
        self._export(dense, "dense-onnx", "dense")
        for name, run, merged, onnx in (
            ("one-shot Wanda", "wanda-run", "wanda-merged", "wanda-onnx"),
            ("LoSA", "run", "merged", "onnx"),
        ):
            self._train(dense, parts, run, one_shot=name != "LoSA")
            self._merge(run, merged)
            self._export(self.out / merged, onnx, "sparse")
        perplexities = [self._perplexity(parts, onnx) for onnx in ("dense-onnx", "wanda-onnx", "onnx")]
        benches = [self._bench("wanda-onnx", "wanda-bench.json"), self._bench("onnx", "bench.json")]
        rows = [DemoRow("dense", perplexities[0], benches[0]["baseline"]["model_bytes"], None, None)]
        for name, ppl, bench in zip(("one-shot Wanda", "LoSA"), perplexities[1:], benches, strict=True):
            size = bench["candidate"]["model_bytes"]
            rows.append(DemoRow(name, ppl, size, _estimate(bench["decode"]), _estimate(bench["prefill"])))
        seconds = self._elapsed(time.monotonic() - start)
        report = DemoReport(self.config, tuple(rows), int(benches[1]["threads"]), seconds)
        self._record(report.as_dict())
        return report

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _texts(self) -> TextParts:
        folder = self.out / "text"

        def make() -> None:
            if self.config.texts:
                write_user_text(self.config.texts, folder)
            else:
                write_embedded_text(folder)

        self._do("splitting text by title into calibration, tuning and validation", "text", make)
        return TextParts.inside(folder)

    def _dense(self) -> Path:
        if self.config.model is not None:
            return resolve_model(self.config.model)
        folder = self.out / "dense"
        self._do("unpacking SmolLM2-135M-Instruct", "dense", lambda: write_embedded_model(folder))
        return folder

    def _train(self, dense: Path, parts: TextParts, name: str, *, one_shot: bool) -> None:
        from losa_export.training.config import TrainConfig

        effort = self.effort
        config = TrainConfig(
            model=dense,
            output=self.out / name,
            tuning_text=(parts.tuning,),
            calibration_text=(parts.calibration,),
            sparsity_fraction=self.config.sparsity_fraction,
            rounds=effort.rounds,
            time_budget_seconds=effort.train_seconds,
            batch_size=effort.batch_size,
            learning_rate=effort.learning_rate,
            window=effort.window,
            calibration_windows=effort.calibration_windows,
        )

        def make() -> None:
            from losa_export.training.preflight import one_shot_config
            from losa_export.training.state import is_resumable
            from losa_export.training.train import train

            chosen = one_shot_config(config) if one_shot else config
            result = train(chosen, resume=is_resumable(chosen.output))
            if result.status == "interrupted":
                raise KeyboardInterrupt

        what = "pruning in one shot by Wanda" if one_shot else "pruning in rounds and tuning under the mask (LoSA)"
        self._do(what, f"{name}/adapter", make)

    def _merge(self, run: str, merged: str) -> None:
        def make() -> None:
            from losa_export.merge import merge_run

            merge_run(self.out / run, self.out / merged)

        self._do(f"merging {run}, with proof", merged, make)

    def _export(self, source: Path, name: str, weights: str) -> None:
        def make() -> None:
            from losa_export.export import ExportConfig, export_onnx

            export_onnx(ExportConfig(source=source, output=self.out / name, weights=weights))  # type: ignore[arg-type]

        self._do(f"exporting {source.name} to ONNX ({weights}), with the gate", name, make)

    def _perplexity(self, parts: TextParts, onnx: str) -> float:
        path = self.out / f"{onnx}-perplexity.json"

        def make() -> None:
            from losa_export.eval.perplexity import perplexity
            from losa_export.runtimes.detokenize import load_stop_ids
            from losa_export.runtimes.loader import load_runtime
            from losa_export.text import load_tokenizer, read_documents, token_windows

            runtime = load_runtime("ort", self.out / onnx, threads=self.config.threads)
            try:
                windows = token_windows(
                    read_documents([parts.validation]),
                    load_tokenizer(self.out / onnx),
                    window=min(self.effort.perplexity_window, runtime.max_positions),
                    count=self.effort.perplexity_windows,
                    seed=0,
                    separator=next(iter(load_stop_ids(self.out / onnx)), None),
                )
                report = perplexity(runtime, windows)
            finally:
                runtime.close()
            write_text_atomic(path, json.dumps(report.as_dict(), indent=2) + "\n")

        self._do(f"perplexity of {onnx} on the validation text", path.name, make)
        return float(_read_record(path)["ppl"])

    def _bench(self, onnx: str, name: str) -> dict[str, Any]:
        def make() -> None:
            from losa_export.eval.bench import BenchConfig, bench

            seconds = self.effort.bench_seconds
            report = bench(
                BenchConfig(
                    candidate=self.out / onnx,
                    baseline=self.out / "dense-onnx",
                    threads=self.config.threads,
                    max_seconds=seconds,
                    min_seconds=min(10.0, seconds),
                    max_warmup_blocks=self.effort.warmup_blocks,
                )
            )
            report.write(self.out / name)

        self._do(f"measuring {onnx} against dense-onnx", name, make)
        return _read_record(self.out / name)

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    def _do(self, what: str, result: str, make: Callable[[], None]) -> None:
        self._step += 1
        if (self.out / result).exists():
            _say(f"[{self._step}] {what}: done before")
            return
        _say(f"[{self._step}] {what}")
        start = time.monotonic()
        make()
        _say(f"[{self._step}] {what}: {time.monotonic() - start:.0f} s")

    def _elapsed(self, now: float) -> float:
        """Working time, also of earlier calls that were completed."""
        earlier = _read_record(self.out / RECORD_FILE).get("seconds", 0.0)
        return max(now, float(earlier))

    def _record(self, result: Mapping[str, Any]) -> None:
        record = {"config": self.config.identity(), **result}
        write_text_atomic(self.out / RECORD_FILE, json.dumps(record, indent=2) + "\n")


def _estimate(comparison: Mapping[str, Any]) -> tuple[float, float, float]:
    chosen = comparison["all_blocks"]
    return float(chosen["ratio"]), float(chosen["low"]), float(chosen["high"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
