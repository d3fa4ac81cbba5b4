"""`losa serve` beside llama.cpp's server: the same load on each in turn, at several concurrencies.

Run as `python -m losa_export.eval.studies.serve_llamacpp onnx/ model.gguf --llama-server PATH --json FILE`; a page
comes out on standard output. In each round both servers are started, loaded and stopped, one after the other and in
changing order, so that neither ever runs beside the other; both get the same prompts, threads, slots and context. Each
round is kept in FILE as it is done, and the same command goes on from there. docs/serve-bench.md tells how to build
llama.cpp's server, and how to make a GGUF file that it can serve.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from losa_export.errors import BenchmarkError, ConfigError, InputError, RuntimeFailureError
from losa_export.eval.machine import machine_record
from losa_export.eval.other_load import OtherLoad, other_load, read_cpu_times, usable_cpus
from losa_export.eval.serve_bench import ServeBenchConfig, bench_serve
from losa_export.eval.serve_metrics import latencies
from losa_export.eval.serve_report import CellReport
from losa_export.eval.stats import MIN_BLOCKS, Verdict, median, paired_ratio, percentiles
from losa_export.eval.studies.command_line import exit_code, file_label, rerun_command
from losa_export.eval.studies.timing import ratio_text
from losa_export.files import check_output_file, input_folder, write_text_atomic
from losa_export.progress import Progress
from losa_export.runtimes.threads import resolve_threads

SCHEMA, SCHEMA_VERSION = "losa-study-serve-llamacpp", 1
Side = Literal["losa", "llamacpp"]
SIDES: tuple[Side, ...] = get_args(Side)

# What settings of either server may come from the environment; a comparison takes none.
_ENVIRONMENT = ("LOSA_SERVE_", "LOSA_API_KEYS", "LLAMA_ARG_", "LLAMA_API_KEY")
_POLL_S = 0.1
_STOP_S = 30.0
# Besides prompt and answer, for special tokens that a server adds.
_SPARE_TOKENS = 16
# As for `losa bench`: where other processes took more of our processors, nothing is said of who was faster.
_MOST_OTHER_LOAD = 0.1


@dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    Attributes:
        onnx: exported folder, for `losa serve`; its tokenizer counts the prompts.
        gguf: model of llama.cpp, with a tokenizer.
        llama_server: its program.
        threads: of both; None takes what the machine offers.
        concurrencies: requests under way; the largest is also the number of slots.
        rounds: of a turn of each.
        num_prompts: requests at each concurrency, of each turn.
        input_len: tokens of a prompt.
        output_len: tokens of each answer.
        seed: of the prompts; a round adds its number.
        startup_s: longest time until a server answers.
        timeout_s: longest time a request may take.
    Raises: ConfigError naming the field that is out of range.
    """

    onnx: Path
    gguf: Path
    llama_server: Path
    threads: int | None = None
    concurrencies: tuple[int, ...] = (1, 4, 8)
    rounds: int = MIN_BLOCKS
    num_prompts: int = 32
    input_len: int = 128
    output_len: int = 64
    seed: int = 0
    startup_s: float = 300.0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.rounds < MIN_BLOCKS:
            raise ConfigError(f"rounds is {self.rounds}; an interval needs at least {MIN_BLOCKS}", field="rounds")
        if not self.startup_s > 0:
            raise ConfigError(f"startup_s is {self.startup_s}; give seconds above 0", field="startup_s")
        self.load("http://127.0.0.1", 0)

    @property
    def context_tokens(self) -> int:
        """Of each slot."""
        return self.input_len + self.output_len + _SPARE_TOKENS

    def load(self, url: str, number: int) -> ServeBenchConfig:
        """What a server at `url` gets in a round. Raises: ConfigError as `ServeBenchConfig`."""
        return ServeBenchConfig(
            url,
            num_prompts=self.num_prompts,
            max_concurrencies=self.concurrencies,
            input_len=self.input_len,
            output_len=self.output_len,
            tokenizer=self.onnx,
            percentiles=(50.0, 95.0),
            seed=self.seed + number,
            # On equal terms: llama.cpp counts at the end only.
            continuous_usage=False,
            warmup=max(self.concurrencies, default=1),
            timeout_s=self.timeout_s,
        )

    def command(self, side: Side, port: int, threads: int) -> list[str]:
        """That starts a server."""
        slots = max(self.concurrencies)
        if side == "losa":
            return [
                *(sys.executable, "-P", "-m", "losa_export", "serve", str(self.onnx)),
                *("--host", "127.0.0.1", "--port", str(port), "--threads", str(threads), "--slots", str(slots)),
                *("--context-tokens", str(self.context_tokens), "--no-page"),
            ]
        # All else is llama.cpp's default: weights repacked, requests batched as they come, a prompt's cache kept.
        return [
            *(str(self.llama_server), "-m", str(self.gguf), "--host", "127.0.0.1", "--port", str(port)),
            *("--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(slots)),
            *("--ctx-size", str(slots * self.context_tokens), "--no-webui"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For the record, without folders."""
        names = {"onnx": self.onnx.resolve().name, "gguf": file_label(self.gguf), "llama_server": None}
        return {**asdict(self), **names, "concurrencies": list(self.concurrencies)}


class Server:
    """A server that is started on a free port, and stopped at the end of its block.

    Args:
        side: which one.
        config: of the study.
        threads: settled.
    Raises: RuntimeFailureError, on entering, if it ends or does not answer in time; with its last words.
    """

    def __init__(self, side: Side, config: StudyConfig, threads: int) -> None:
        self._side, self._config, self._threads = side, config, threads

    def __enter__(self) -> Self:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()
        environment = {name: text for name, text in os.environ.items() if not name.startswith(_ENVIRONMENT)}
        try:
            self._process = subprocess.Popen(
                self._config.command(self._side, port, self._threads),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        except OSError as error:
            self._log.close()
            raise RuntimeFailureError(f"the server of {self._side} cannot be started: {error}") from error
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def _wait(self) -> None:
        deadline = time.monotonic() + self._config.startup_s
        while not _answers(f"{self.url}/v1/models"):
            code = self._process.poll()
            if code is not None:
                raise RuntimeFailureError(
                    f"the server of {self._side} ended with {code} before it answered:\n{self._last_words()}", code=code
                )
            if time.monotonic() > deadline:
                raise RuntimeFailureError(
                    f"the server of {self._side} did not answer within {self._config.startup_s:g} s:\n"
                    f"{self._last_words()}"
                )
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").strip().splitlines()[-8:])

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def compare(config: StudyConfig, keep: Path | None = None, *, show_progress: bool = True) -> list[dict[str, Any]]:
    """Load both servers in turns.

    Args:
        config: what is compared.
        keep: file that holds the rounds done, and is written after each.
        show_progress: on standard error.
    Returns: a record of each round.
    Raises:
        InputError: a model or the program is missing, or `keep` is of another study.
        RuntimeFailureError: a server does not start or does not answer.
        BenchmarkError: a request failed or had an answer of another length, so that speeds would not compare.
    """
    input_folder(config.onnx, what="export")
    for path, what in ((config.gguf, "model"), (config.llama_server, "program")):
        if not path.is_file():
            raise InputError(f"the {what} '{path}' is no file; check the path", path=path)
    threads = resolve_threads(config.threads)
    rounds = [] if keep is None else _kept(keep, config, threads)
    with Progress("comparing", 2 * config.rounds, "turns", enabled=show_progress) as progress:
        progress.advance(2 * len(rounds))
        for number in range(len(rounds), config.rounds):
            found: dict[str, Any] = {}
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                found[side] = _turn(side, config, threads, number)
                progress.advance()
            rounds.append(found)
            if keep is not None:
                write_text_atomic(keep, json.dumps(document_of(config, threads, rounds), indent=1) + "\n")
    return rounds


def _turn(side: Side, config: StudyConfig, threads: int, number: int) -> dict[str, Any]:
    """Start a server, load it, and stop it."""
    cpus = usable_cpus()
    with Server(side, config, threads) as server:
        pids = (server.pid, os.getpid())
        began, before = time.monotonic(), read_cpu_times(pids, cpus)
        report = bench_serve(config.load(server.url, number), show_progress=False)
        load = other_load(before, read_cpu_times(pids, cpus), time.monotonic() - began, len(cpus))
    if report.interrupted:
        raise KeyboardInterrupt
    return {
        "server": report.server,
        "other_load": None if load is None else asdict(load),
        "cells": [_cell(side, config, cell) for cell in report.cells],
    }


def _cell(side: Side, config: StudyConfig, cell: CellReport) -> dict[str, Any]:
    """What is kept of a load. Raises: BenchmarkError unless each request had its whole answer."""
    short = sum(record.output_tokens != config.output_len for record in cell.requests)
    if cell.metrics.completed < config.num_prompts or short:
        raise BenchmarkError(
            f"{side}, {cell.max_concurrency} under way: {cell.metrics.completed} of {config.num_prompts} requests were "
            f"completed ({cell.metrics.failures or 'none failed'}), {short} not with {config.output_len} tokens, so "
            "speeds would not compare; see the server's limits, or ask for less"
        )
    found = [one for one in map(latencies, cell.requests) if one is not None]
    return {
        "concurrency": cell.max_concurrency,
        "tokens_per_s": cell.metrics.output_tokens_per_s,
        "prompt_tokens": cell.metrics.prompt_tokens,
        "client_cpu_fraction": cell.client_cpu_fraction,
        "ttft_ms": [round(one.ttft_ms, 3) for one in found],
        "tpot_ms": [round(one.tpot_ms, 3) for one in found if one.tpot_ms is not None],
    }


def rows_of(config: StudyConfig, rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each concurrency: tokens/s of both, their ratio over the rounds, and latencies of all requests."""
    rows = []
    busy = _busiest(rounds)
    for place, concurrency in enumerate(config.concurrencies):
        cells = {side: [found[side]["cells"][place] for found in rounds] for side in SIDES}
        speeds = {side: [cell["tokens_per_s"] for cell in cells[side]] for side in SIDES}
        # Seconds per token: the ratio is theirs over ours, so above 1 we are faster.
        ratio = asdict(paired_ratio(*([[1 / speed] for speed in speeds[side]] for side in ("llamacpp", "losa"))))
        if busy is not None and busy.others > _MOST_OTHER_LOAD:
            ratio["verdict"] = Verdict.NO_VERDICT
        row: dict[str, Any] = {"concurrency": concurrency, "ratio": ratio}
        for side in SIDES:
            spreads = {name: [one for cell in cells[side] for one in cell[name]] for name in ("ttft_ms", "tpot_ms")}
            row[side] = {
                "tokens_per_s": median(speeds[side]),
                "tokens_per_s_range": [min(speeds[side]), max(speeds[side])],
                "ttft_ms": percentiles(spreads["ttft_ms"], (50, 95)),
                "tpot_ms": percentiles(spreads["tpot_ms"], (50, 95)) if spreads["tpot_ms"] else None,
            }
        rows.append(row)
    return rows


def document_of(
    config: StudyConfig, threads: int, rounds: Sequence[Mapping[str, Any]], command: str = ""
) -> dict[str, Any]:
    """The record: rounds as measured, and rows once there are enough of them for an interval."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "config": config.as_dict(),
        "threads": threads,
        "llama_server": _version(config.llama_server),
        "gguf_bytes": config.gguf.stat().st_size,
        "onnx_bytes": sum(path.stat().st_size for path in config.onnx.iterdir() if ".onnx" in path.name),
        "machine": machine_record().as_dict(),
        "rounds": list(rounds),
        "rows": rows_of(config, rounds) if len(rounds) >= MIN_BLOCKS else [],
    }


def page(document: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    config, threads = document["config"], document["threads"]
    lines = [
        f"`losa serve` on {config['onnx']} ({_mib(document['onnx_bytes'])}) beside llama.cpp's server "
        f"({document['llama_server']}) on {config['gguf']} ({_mib(document['gguf_bytes'])}): {config['num_prompts']} "
        f"requests of {config['input_len']} tokens in and {config['output_len']} out at each concurrency, in "
        f"{config['rounds']} turns of both; {threads} thread{'s' if threads > 1 else ''}, "
        f"{document['machine']['cpu_model']}.",
        "",
        "| under way | losa serve, tokens/s | llama.cpp, tokens/s | times as fast (95 %) | TTFT p95, ms | llama.cpp's "
        "| TPOT p50, ms | llama.cpp's |",
        "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in document["rows"]:
        speeds = (
            f"{row[side]['tokens_per_s']:.1f} ({' – '.join(f'{end:.1f}' for end in row[side]['tokens_per_s_range'])})"
            for side in SIDES
        )
        ttft = (f"{row[side]['ttft_ms']['p95']:.0f}" for side in SIDES)
        tpot = ("" if row[side]["tpot_ms"] is None else f"{row[side]['tpot_ms']['p50']:.1f}" for side in SIDES)
        cells = (str(row["concurrency"]), *speeds, ratio_text(row["ratio"]), *ttft, *tpot)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Tokens/s: median of the turns (least – most). Latencies are of all requests of all turns."]
    counts = {side: document["rounds"][0][side]["cells"][0]["prompt_tokens"] for side in SIDES}
    if counts["losa"] != counts["llamacpp"]:
        lines.append(
            f"The servers do not count alike: {counts['losa']} and {counts['llamacpp']} tokens in the same "
            f"{config['num_prompts']} prompts."
        )
    busy = _busiest(document["rounds"])
    if busy is not None and busy.others > _MOST_OTHER_LOAD:
        lines.append(
            f"Warning: other processes took up to {busy.others:.0%} of the processors during a turn "
            f"({_MOST_OTHER_LOAD:.0%} is allowed), so no verdict is given; stop them and run again."
        )
    if document["command"]:
        lines += ["", f"    {document['command']}"]
    return "\n".join(lines) + "\n"


def _busiest(rounds: Sequence[Mapping[str, Any]]) -> OtherLoad | None:
    """The turn in which others took most; None where no turn could tell."""
    loads = [OtherLoad(**found[side]["other_load"]) for found in rounds for side in SIDES if found[side]["other_load"]]
    return max(loads, key=lambda load: load.others, default=None)


def _kept(path: Path, config: StudyConfig, threads: int) -> list[dict[str, Any]]:
    """Rounds that were done before. Raises: InputError if the file is of another study."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        same = document["schema"] == SCHEMA and document["schema_version"] == SCHEMA_VERSION
        same = same and document["threads"] == threads and document["config"] == _plain(config.as_dict())
        rounds = list(document["rounds"]) if same else None
    except (OSError, ValueError, TypeError, KeyError):
        rounds = None
    if rounds is None:
        raise InputError(f"'{path}' is no record of this study with these settings; give another file", path=path)
    return rounds


def _plain(values: Mapping[str, Any]) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(values))


def _version(program: Path) -> str:
    """What llama.cpp's server says of its build; 'unknown' if it does not."""
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    for line in (done.stderr + done.stdout).splitlines():
        if line.startswith("version:"):
            return line.removeprefix("version:").strip()
    return "unknown"


def _answers(url: str) -> bool:
    """Whether there is an answer of status 200, without a proxy."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def main(argv: Sequence[str] | None = None) -> int:
    """Hold `losa serve` against llama.cpp's server. Returns: the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.serve_llamacpp", description=main.__doc__)
    parser.add_argument("onnx", type=Path, metavar="ONNX", help="exported folder")
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="model of llama.cpp, with a tokenizer")
    parser.add_argument("--llama-server", type=Path, required=True, metavar="PATH", help="llama.cpp's program")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: what the machine offers")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="requests under way (default: 1 4 8)"
    )
    for flag, default, text in (
        ("--rounds", MIN_BLOCKS, "a turn of each"),
        ("--num-prompts", 32, "requests at each concurrency, of each turn"),
        ("--input-len", 128, "tokens of a prompt"),
        ("--output-len", 64, "tokens of an answer"),
        ("--seed", 0, "of the prompts"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="all figures, and where to go on")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE", help="the page")
    options = parser.parse_args(words)

    def run() -> bool:
        config = StudyConfig(
            options.onnx,
            options.gguf,
            options.llama_server,
            threads=options.threads,
            concurrencies=tuple(options.concurrency),
            rounds=options.rounds,
            num_prompts=options.num_prompts,
            input_len=options.input_len,
            output_len=options.output_len,
            seed=options.seed,
        )
        for path in (options.json, options.markdown):
            if path is not None:
                check_output_file(path)
        rounds = compare(config, options.json)
        command = rerun_command("serve_llamacpp", words)
        document = _plain(document_of(config, resolve_threads(config.threads), rounds, command))
        if options.json is not None:
            write_text_atomic(options.json, json.dumps(document, indent=1) + "\n")
        if options.markdown is not None:
            write_text_atomic(options.markdown, page(document))
        sys.stdout.write(page(document))
        return True

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
