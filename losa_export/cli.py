"""The command line: one verb per step of the data path.

Each command parses, builds a config, calls one function and prints. Heavy packages are imported inside
the commands, so that `--help` stays fast. Results go to stdout, progress and errors to stderr.
Exit codes: 0 done, 1 the run failed, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.errors import LosaError

if TYPE_CHECKING:
    from losa_export.training.config import TrainConfig

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `losa VERB …`. Returns: the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:2] == ["bench", "kernels"]:
        return _run(_kernels_parser().parse_args(words[2:]))
    if words[:2] == ["bench", "compare"]:
        return _run(_compare_parser().parse_args(words[2:]))
    return _run(_parser().parse_args(words))


def main_export(argv: Sequence[str] | None = None) -> int:
    """Run `losa-export …`, which is `losa export …`. Returns: the exit code."""
    parser = argparse.ArgumentParser(prog="losa-export", description=_EXPORT_TEXT)
    _add_export(parser)
    return _run(parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    command: _Command = arguments.command
    try:
        return command(arguments)
    except LosaError as error:
        print(f"losa: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("losa: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, for example `| head`
        sys.stderr.close()
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="losa",
        description="Prune a language model, tune it under its mask, export it, and run it fast on a CPU.",
        epilog="Start with 'losa demo': the whole path on a real model that is already in the installed packages.",
    )
    parser.add_argument("--version", action="version", version=f"losa-export {version('losa-export')}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, text, add in (
        ("demo", "the whole path on an embedded model, in one command", _add_demo),
        ("train", "prune in rounds while tuning masked adapters: checkpoint → run/", _add_train),
        ("merge", "fold the adapters into the weights, with proof: run/ → merged/", _add_merge),
        ("export", "write one ONNX model: merged/ → onnx/", _add_export),
        (
            "bench",
            "measure an exported model against a dense one; 'losa bench kernels': single products; 'compare': two records",
            _add_bench,
        ),
        ("report", "one page of benchmarks and training runs: DIR… → report.html", _add_report),
        ("doctor", "examine this CPU: which sparsity pays, with which values", _add_doctor),
        ("synth", "write a random checkpoint of a published shape, for benchmarks", _add_synth),
        ("runtimes", "list, install or remove engines that need an environment of their own", _add_runtimes),
        ("generate", "continue a text with an exported model", _add_generate),
    ):
        add(verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return parser


# ---- values -------------------------------------------------------------------------------------------------------


def _fraction(text: str) -> float:
    """A sparsity as 0.7 or 70%; its range is the config's business, which names the field."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number; write 0.7 or 70%") from None


_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


def _duration(text: str) -> float:
    """A duration such as 90, 90s, 10m or 1.5h, in seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|)\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no duration; write for example 90s, 10m or 1.5h")
    return float(match[1]) * _SECONDS[match[2]]


def _add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=default is None,
        default=None if default is None else Path(default),
        metavar="DIR",
        help="folder to write" + ("" if default is None else " (default: %(default)s)"),
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="compute threads (default: the physical cores we may use)",
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, metavar="DIR_OR_HUB_ID", help="instead of the embedded SmolLM2-135M")
    parser.add_argument("--text", type=Path, nargs="+", default=(), metavar="FILE", help="instead of the embedded text")
    parser.add_argument("--sparsity", type=_fraction, default=0.5, metavar="S", help="zeros, e.g. 70%% (default: 0.5)")
    parser.add_argument(
        "--quick", action="store_true", help="about 5 minutes instead of 20: less tuning, fewer samples"
    )
    _add_output(parser, "demo-out")
    _add_threads(parser)
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from losa_export.demo import DemoConfig, run_demo

    config = DemoConfig(
        output=arguments.output,
        model=arguments.model,
        texts=tuple(arguments.text),
        sparsity_fraction=arguments.sparsity,
        quick=arguments.quick,
        threads=arguments.threads,
        overwrite=arguments.overwrite,
    )
    print(run_demo(config))
    return 0


# ---- train --------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    # Options are named after the fields they set and have no default here: what the user leaves out comes from the
    # preset or config file, and else from TrainConfig.
    parser.epilog = (
        "An option given here wins over the preset or config file. Every other setting, and what each means: "
        "losa_export.training.config.TrainConfig; a run's config.toml is a config file with all of them."
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or hub id")
    _add_setting(
        parser, "--sparsity", "sparsity_fraction", _fraction, "S", "zeros at the end, e.g. 0.5 or 50%%; 0: plain LoRA"
    )
    _add_output(parser, None)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--preset",
        metavar="NAME",
        help="'recommended': the method with what later work found better; 'faithful': as it was released"
        " (default: neither; uniform sparsity and rank, cross-entropy alone)",
    )
    source.add_argument(
        "--config", type=Path, metavar="FILE", help="settings of your own, under [train] in a TOML file"
    )
    text = parser.add_argument_group("text")
    _add_setting(
        text,
        "--text",
        "tuning_text",
        Path,
        "FILE",
        "tune on these: plain text, or .jsonl or .json with text, instructions or messages"
        " (default: embedded Wikipedia paragraphs)",
        nargs="+",
    )
    _add_setting(
        text,
        "--calibration",
        "calibration_text",
        Path,
        "FILE",
        "activation statistics from these (default: the tuning text)",
        nargs="+",
    )
    _add_setting(text, "--window", "window", int, "TOKENS", "tokens in a window (default: 256)")
    _add_setting(text, "--calibration-windows", "calibration_windows", int, "N", "default: 16")
    _add_setting(
        text, "--calibration-window", "calibration_window", int, "TOKENS", "tokens in one of them (default: --window)"
    )
    _add_switch(
        text, "--packing", "packing", "windows cut from the joined texts, or one padded document each (default: packed)"
    )
    _add_switch(text, "--bos", "add_bos", "begin each document with the model's token for that (default: no)")
    _add_switch(text, "--eos", "add_eos", "end each document with the model's token for that (default: yes)")
    pruning = parser.add_argument_group("pruning")
    _add_setting(pruning, "--rounds", "rounds", int, "T", "prune-then-tune rounds (default: 5)")
    _add_setting(
        pruning,
        "--criterion",
        "criterion",
        str,
        "NAME",
        "which weights go: wanda, magnitude, or sparsegpt or alps, which also change those that stay (default: wanda)",
    )
    _add_setting(
        pruning,
        "--pattern",
        "pattern",
        str,
        "N:M",
        "keep N of each M columns, such as 2:4; 'mixed:8' lets each block have its own N (default: no pattern)",
    )
    _add_setting(
        pruning, "--damping", "damping", float, "D", "of sparsegpt and alps, part of the mean diagonal (default: 0.01)"
    )
    _add_setting(
        pruning,
        "--sparsity-allocator",
        "sparsity_allocator",
        str,
        "NAME",
        "how sparsity is shared out among blocks: uniform, lp, linear, owl, atp or fixed (default: uniform)",
    )
    _add_setting(
        pruning,
        "--sparsity-band",
        "sparsity_band",
        _auto_or_fraction,
        "D",
        "of lp and linear: how far a block may lie from a round's target; auto is 0.01 to 0.03",
    )
    _add_setting(
        pruning,
        "--block-sparsities",
        "block_sparsities",
        _fraction,
        "S",
        "of fixed: one for each block, of which the proportions count",
        nargs="+",
    )
    _add_setting(
        pruning,
        "--rmi-windows",
        "rmi_windows",
        int,
        "N",
        "of lp and linear: compare blocks over the first N calibration windows, not over all",
    )
    _add_switch(pruning, "--rmi-debiased", "rmi_debiased", "of lp and linear: compare them without bias (default: no)")
    _add_setting(
        pruning, "--owl-spread", "owl_spread", float, "L", "of owl: half the span of densities (default: 0.08)"
    )
    _add_setting(
        pruning, "--atp-difference", "atp_difference", float, "D", "of atp: between neighbours (default: 0.01)"
    )
    _add_setting(
        pruning,
        "--reconstruct-epochs",
        "reconstruct_epochs",
        int,
        "N",
        "passes in which a pruned block is fitted to the dense one's answers (default: 0)",
    )
    _add_switch(
        pruning,
        "--reconstruct-least-squares",
        "reconstruct_least_squares",
        "fit each pruned linear alone, in closed form, before that or in its place (default: no)",
    )
    tuning = parser.add_argument_group("tuning")
    _add_setting(
        tuning,
        "--steps",
        "steps",
        int,
        "N",
        "optimizer steps in all; 0 prunes only (default: one pass over the text, or what fits into --time-budget)",
    )
    _add_setting(
        tuning,
        "--time-budget",
        "time_budget_seconds",
        _duration,
        "TIME",
        "such as 10m: stop in good order by then",
    )
    _add_setting(tuning, "--batch-size", "batch_size", int, "N", "windows in a step (default: 4)")
    _add_setting(tuning, "--learning-rate", "learning_rate", float, "LR", "peak (default: 0.001)")
    _add_setting(
        tuning,
        "--schedule",
        "learning_rate_schedule",
        str,
        "NAME",
        "cosine: one over all rounds; per_round: each rises and falls, its optimizer anew (default: cosine)",
    )
    _add_setting(tuning, "--rank", "rank", int, "R", "mean rank of the adapters (default: 8)")
    _add_setting(tuning, "--max-rank", "max_rank", int, "R", "largest of a block (default: 16, or --rank if larger)")
    _add_setting(
        tuning,
        "--rank-allocator",
        "rank_allocator",
        str,
        "NAME",
        "how rank is shared out among blocks: uniform, water_filling or proportional (default: uniform)",
    )
    _add_setting(
        tuning, "--rank-growth", "rank_growth", float, "R", "rise of the mean rank from round to round (default: 0.0)"
    )
    _add_setting(
        tuning,
        "--error-kind",
        "error_kind",
        str,
        "NAME",
        "error that ranks go by: accumulated over blocks, or local to each (default: accumulated)",
    )
    _add_setting(
        tuning,
        "--kl-weight",
        "kl_weight",
        float,
        "W",
        "how much the dense model's predictions count beside the text (default: 0.0)",
    )
    _add_setting(
        tuning,
        "--squarehead-weight",
        "squarehead_weight",
        float,
        "W",
        "how much its blocks' outputs count (default: 0.0)",
    )
    _add_setting(
        tuning,
        "--operator",
        "operator",
        str,
        "NAME",
        "exact gradients; exact_bf16: one product of three in bfloat16; lors: none of it, and no mask in them"
        " (default: exact)",
    )
    _add_setting(tuning, "--dropout", "adapter_dropout", float, "P", "before the adapters (default: 0.0)")
    _add_switch(
        tuning,
        "--gradient-checkpointing",
        "gradient_checkpointing",
        "compute blocks again instead of keeping their activations: less memory, a third slower (default: no)",
    )
    _add_setting(
        tuning, "--dtype", "dtype", str, "TYPE", "fp32 or bf16 frozen weights; adapters are fp32 (default: fp32)"
    )
    _add_setting(
        tuning,
        "--compute",
        "compute",
        str,
        "TYPE",
        "fp32, bf16 or auto activations and products; auto is bf16 where base and processor are too (default: auto)",
    )
    _add_setting(tuning, "--device", "device", str, "NAME", "auto, cpu or cuda (default: auto)")
    _add_setting(tuning, "--seed", "seed", int, "N", "default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument(
        "--plot", action="store_true", help="draw sparsity, rank and error of the blocks over the rounds: rounds.png"
    )
    parser.set_defaults(command=_train)


def _auto_or_fraction(text: str) -> float | None:
    return None if text == "auto" else _fraction(text)


_Options = argparse.ArgumentParser | argparse._ArgumentGroup


def _add_setting(
    parser: _Options, flag: str, field: str, kind: Callable[[str], Any], metavar: str, text: str, **more: Any
) -> None:
    parser.add_argument(flag, dest=field, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text, **more)


def _add_switch(parser: _Options, flag: str, field: str, text: str) -> None:
    parser.add_argument(flag, dest=field, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration that `losa train` was asked for: options, over preset or config file, over defaults."""
    import dataclasses

    from losa_export.errors import ConfigError
    from losa_export.sources import default_text, resolve_model
    from losa_export.training.config import TrainConfig
    from losa_export.training.settings import preset_file, read_settings

    settings: dict[str, Any] = {}
    if arguments.preset is not None or arguments.config is not None:
        settings = read_settings(arguments.config or preset_file(arguments.preset))
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    settings |= {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings["model"] = resolve_model(arguments.model)
    if "sparsity_fraction" not in settings:
        raise ConfigError("sparsity_fraction is not given; add for example --sparsity 0.5", field="sparsity_fraction")
    if not settings.get("tuning_text"):
        parts = default_text()
        settings["tuning_text"] = (parts.tuning,)
        settings["calibration_text"] = settings.get("calibration_text") or (parts.calibration,)
    if "max_rank" not in settings:
        settings["max_rank"] = max(16, settings.get("rank", TrainConfig.rank))
    return TrainConfig(**settings)


def _train(arguments: argparse.Namespace) -> int:
    from losa_export.progress import duration

    config = _train_config(arguments)
    from losa_export.training.plot import check_plotting, plot_rounds
    from losa_export.training.processes import is_first_process
    from losa_export.training.train import train

    if arguments.plot:
        check_plotting()

    result = train(config, resume=arguments.resume)
    if not is_first_process():
        return 0 if result.status == "completed" else EXIT_INTERRUPTED
    if result.status == "interrupted":
        print("losa: interrupted; everything is saved, go on with the same command and --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    if arguments.plot:
        print(f"losa: drew {plot_rounds(result.run)}", file=sys.stderr)
    print(
        f"{result.run}: {result.sparsity_fraction:.2%} zeros after {len(result.rounds)} rounds and "
        f"{duration(result.elapsed_seconds)}; next: losa merge {arguments.output} -o merged"
    )
    return 0


# ---- merge --------------------------------------------------------------------------------------------------------


def _add_merge(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder of 'losa train'")
    source.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a LoRA trained elsewhere (PEFT layout); needs --base"
    )
    parser.add_argument(
        "--base", default=None, metavar="DIR_OR_HUB_ID", help="checkpoint (default: the one the run was made from)"
    )
    _add_output(parser, None)
    parser.set_defaults(command=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from losa_export.errors import ConfigError
    from losa_export.merge import merge_adapter, merge_run
    from losa_export.sources import resolve_model

    base = resolve_model(arguments.base) if arguments.base is not None else None
    if arguments.adapter is None:
        report = merge_run(arguments.run, arguments.output, base=base, overwrite=arguments.overwrite)
    elif base is None:
        raise ConfigError("--adapter needs --base: the sparse checkpoint that the LoRA was trained on", field="base")
    else:
        report = merge_adapter(base, arguments.adapter, arguments.output, overwrite=arguments.overwrite)
    print(report)
    return 0


# ---- export -------------------------------------------------------------------------------------------------------

_EXPORT_TEXT = "Write one ONNX model: merged/ → onnx/."


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT", help="folder, or hub id; sparse or dense")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--profile",
        choices=("auto", "ort", "standard", "deepsparse"),
        default="auto",
        help="'ort' uses ONNX Runtime's own operators and is faster; 'standard' uses those of ONNX alone;"
        " 'deepsparse' is for that engine (default: ort where our builder writes the graph)",
    )
    parser.add_argument(
        "--exporter",
        choices=("auto", "builder", "torch"),
        default="auto",
        help="'builder' knows some families; 'torch' follows any decoder by torch.onnx (default: builder where it can)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "sparse", "dense"),
        default="auto",
        help="compressed zeros, or ordinary matrices (default: sparse for a sparse checkpoint)",
    )
    parser.add_argument(
        "--values",
        choices=("fp32", "bf16", "int8", "int4"),
        default="fp32",
        help="type of the non-zeros; fp32 is exact (default: %(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=("auto", "fp32", "bf16", "int8", "int4"),
        default="auto",
        help="type of head and embedding (default: that of the values, but int8 for int4)",
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=(32, 64, 128),
        default=128,
        help="columns that share a scale, for int8 and int4 (default: %(default)s)",
    )
    parser.add_argument(
        "--activations",
        choices=("int16", "int8"),
        default="int16",
        help="what activations are rounded to before int8 and int4 weights (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="round int8 and int4 values for the least error on these .txt or .jsonl files; needs torch, and minutes",
    )
    parser.add_argument(
        "--calibration-windows", type=int, default=32, metavar="N", help="of 512 tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--no-gate", dest="gate", action="store_false", help="do not compare the answers with the source's"
    )
    _add_output(parser, "onnx")
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from losa_export.export import ExportConfig, export_onnx
    from losa_export.sources import resolve_model

    report = export_onnx(
        ExportConfig(
            source=resolve_model(arguments.source),
            output=arguments.output,
            profile=arguments.profile,
            exporter=arguments.exporter,
            weights=arguments.weights,
            values=arguments.values,
            head=arguments.head,
            group=arguments.group,
            activations=arguments.activations,
            calibration=tuple(arguments.calibration),
            calibration_windows=arguments.calibration_windows,
            gate=arguments.gate,
            overwrite=arguments.overwrite,
        )
    )
    print(report)
    return 0


# ---- bench --------------------------------------------------------------------------------------------------------


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("candidate", type=Path, metavar="ONNX", help="exported folder to measure")
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="exported folder to compare with")
    runtimes = ("ort", "ort-stock", "genai", "torch", "deepsparse", "openvino")
    parser.add_argument(
        "--runtime",
        type=_engines,
        default=[("ort", None)],
        metavar="NAME[:DIR][,NAME…]",
        help=f"of the candidate: {', '.join(runtimes)}; with DIR another folder for that engine (default: ort)",
    )
    parser.add_argument(
        "--against-runtime", choices=runtimes, default="ort-stock", help="of the other (default: %(default)s)"
    )
    for flag, default, text in (
        ("--prompt", 128, "tokens prefilled"),
        ("--gen", 64, "tokens then decoded"),
        ("--batch", 1, "rows decoded together"),
    ):
        parser.add_argument(
            flag, type=_counts, default=[default], metavar="N[,N…]", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--max-time", type=_duration, default=180.0, metavar="TIME", help="of the timed part, at most (default: 3m)"
    )
    parser.add_argument(
        "--answers",
        choices=("auto", "same", "own"),
        default="auto",
        help="'same': both must answer alike; 'own': different weights on purpose, each checked by a second engine"
        " (default: by the hashes in export.json)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), metavar="FILE", help="raw samples (default: %(default)s)"
    )
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="a line for each combination")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE", help="the table")
    parser.add_argument(
        "--threads",
        type=_counts,
        default=[None],
        metavar="N[,N…]",
        help="compute threads (default: the physical cores we may use)",
    )
    parser.set_defaults(command=_bench)


def _engines(text: str) -> list[tuple[Any, Path | None]]:
    """Runtimes such as ort,deepsparse:ds/ with their folders; an unknown name is the config's business."""
    pairs = [word.partition(":") for word in text.split(",")]
    return [(name, Path(folder) if folder else None) for name, _, folder in pairs]


def _counts(text: str) -> list[int]:
    """Whole numbers such as 1,2,4; their range is the config's business, which names the field."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' are no whole numbers; write for example 1,2") from None


def _bench(arguments: argparse.Namespace) -> int:
    from losa_export.eval.bench import BenchConfig, bench
    from losa_export.eval.bench_sweep import SweepReport, combinations, sweep
    from losa_export.eval.report import bench_markdown, print_bench
    from losa_export.files import check_output_file, write_text_atomic

    outputs = [path for path in (arguments.json, arguments.csv, arguments.markdown) if path is not None]
    for path in outputs:
        check_output_file(path)
    common = BenchConfig(
        candidate=arguments.candidate,
        baseline=arguments.against,
        baseline_runtime=arguments.against_runtime,
        answers=arguments.answers,
        min_seconds=min(10.0, arguments.max_time),
        max_seconds=arguments.max_time,
    )
    configs = combinations(
        common,
        engines=arguments.runtime,
        threads=arguments.threads,
        batches=arguments.batch,
        prompts=arguments.prompt,
        news=arguments.gen,
    )
    if len(configs) == 1:
        single = bench(configs[0])
        single.write(arguments.json)
        print_bench(single.as_dict())
        found, table = SweepReport([single.as_dict()]), bench_markdown(single.as_dict())
    else:
        found = sweep(configs, keep=lambda report: report.write(arguments.json))
        table = found.markdown()
        print(table, end="")
    if arguments.csv is not None:
        write_text_atomic(arguments.csv, found.csv())
    if arguments.markdown is not None:
        write_text_atomic(arguments.markdown, table)
    return EXIT_FAILED if found.failed else 0


def _compare_parser() -> argparse.ArgumentParser:
    """`losa bench compare`: apart, as `losa bench kernels` is."""
    parser = argparse.ArgumentParser(
        prog="losa bench compare",
        description="Compare two records of 'losa bench' with the same baseline: has the candidate become slower?",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json", help="record to compare with")
    parser.add_argument("after", type=Path, metavar="AFTER.json", help="record in question")
    parser.add_argument(
        "--fail-if-slower",
        type=_fraction,
        default=None,
        metavar="S",
        help="exit with 1 if prefill or decode is shown to be slower, and by more than this, such as 3%%",
    )
    parser.set_defaults(command=_compare)
    return parser


def _compare(arguments: argparse.Namespace) -> int:
    from losa_export.eval.bench_compare import compare_records

    changes = compare_records(arguments.before, arguments.after)
    for change in changes:
        print(change)
    limit = arguments.fail_if_slower
    slower = [change.metric for change in changes if limit is not None and change.slower_than(limit)]
    if slower:
        print(f"losa: slower by more than {limit:.1%}: {', '.join(slower)}", file=sys.stderr)
    return EXIT_FAILED if slower else 0


def _kernels_parser() -> argparse.ArgumentParser:
    """`losa bench kernels`: apart from `losa bench`, whose first argument is a folder."""
    parser = argparse.ArgumentParser(
        prog="losa bench kernels", description="Time single products against ONNX Runtime's and torch's, cold weights."
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=("llama2-7b",),
        metavar="SHAPE",
        help="smollm2, tinyllama, llama2-7b or ROWSxCOLUMNS (default: llama2-7b)",
    )
    parser.add_argument("--sparsity", type=_fraction, nargs="+", default=None, metavar="S", help="such as 50%% 70%%")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, metavar="M", help="rows of the activations")
    parser.add_argument(
        "--values",
        nargs="+",
        default=("fp32", "bf16", "int8", "int4"),
        metavar="TYPE",
        help="fp32, bf16, int8, int4; with -a8 for 8-bit activations, dense-… without a mask (default: the four)",
    )
    parser.add_argument(
        "--rows", nargs="+", default=(), metavar="ROW", help="kernel rows, or 'all' (default: the one in use)"
    )
    parser.add_argument("--peers", nargs="*", default=None, metavar="NAME", help="default: all that are installed")
    parser.add_argument("--seconds", type=float, default=None, metavar="S", help="timed part of a case")
    parser.add_argument("--ring", type=int, default=None, metavar="MIB", help="what a weight's copies exceed together")
    parser.add_argument("--quick", action="store_true", help="fewer cases, peers and copies")
    parser.add_argument(
        "--json", type=Path, default=Path("kernels.json"), metavar="FILE", help="raw samples (default: %(default)s)"
    )
    _add_threads(parser)
    parser.set_defaults(command=_bench_kernels)
    return parser


def _bench_kernels(arguments: argparse.Namespace) -> int:
    from losa_export.eval.kernel_bench import KernelBenchConfig, bench_kernels
    from losa_export.eval.kernel_bench_report import print_kernel_bench
    from losa_export.files import check_output_file

    check_output_file(arguments.json)
    report = bench_kernels(
        KernelBenchConfig(
            shapes=tuple(arguments.shapes),
            sparsities=None if arguments.sparsity is None else tuple(arguments.sparsity),
            tokens=None if arguments.tokens is None else tuple(arguments.tokens),
            values=tuple(arguments.values),
            rows=tuple(arguments.rows),
            peers=None if arguments.peers is None else tuple(arguments.peers),
            threads=arguments.threads,
            seconds=arguments.seconds,
            ring_mebibytes=arguments.ring,
            quick=arguments.quick,
        )
    )
    report.write(arguments.json)
    print_kernel_bench(report.as_dict())
    return 0


# ---- report -------------------------------------------------------------------------------------------------------


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="folders or files with records")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="page to write (default: %(default)s)",
    )
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE", help="the tables as Markdown too")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from losa_export.eval.html_report import write_report

    found = write_report(arguments.places, arguments.output, arguments.markdown)
    for path, reason in found.skipped:
        print(f"losa: left out '{path}': {reason}", file=sys.stderr)
    print(f"{arguments.output}: {len(found.benches)} benchmarks, {len(found.runs)} training runs")
    return 0


# ---- doctor -------------------------------------------------------------------------------------------------------


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures too")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="to take for everything (default: %(default)s)"
    )
    parser.add_argument("--shape", default="2048x2048", metavar="NxK", help="of the weight (default: %(default)s)")
    _add_threads(parser)
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from losa_export.eval.doctor import DoctorConfig, run_doctor
    from losa_export.eval.doctor_report import print_doctor
    from losa_export.files import check_output_file

    if arguments.json is not None:
        check_output_file(arguments.json)
    report = run_doctor(DoctorConfig(threads=arguments.threads, seconds=arguments.seconds, shape=arguments.shape))
    if arguments.json is not None:
        report.write(arguments.json)
    print_doctor(report.as_dict())
    if report.missing is not None:
        raise report.missing
    return 0


# ---- synth --------------------------------------------------------------------------------------------------------


def _add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--like", required=True, metavar="MODEL", help="smollm2-135m, tinyllama-1.1b, llama-2-7b, …")
    parser.add_argument("--blocks", type=int, default=None, metavar="N", help="default: as many as the model has")
    parser.add_argument(
        "--sparsity", type=_fraction, default=0.0, metavar="S", help="zeros of the linears, such as 70%% (default: 0)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    _add_output(parser, None)
    parser.set_defaults(command=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from losa_export.synth import SynthConfig, synthesise

    config = SynthConfig(
        like=arguments.like,
        output=arguments.output,
        blocks=arguments.blocks,
        sparsity_fraction=arguments.sparsity,
        dtype=arguments.dtype,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    size = synthesise(config)
    print(f"{arguments.output}: {size / 1e6:.0f} MB, random; next: losa export {arguments.output} -o onnx")
    return 0


# ---- runtimes -----------------------------------------------------------------------------------------------------


def _add_runtimes(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="what there is, and what is installed")
    listing.set_defaults(command=_list_runtimes)
    for name, command, text in (
        ("install", _install_runtime, "make an engine's environment in the cache folder"),
        ("remove", _remove_runtime, "take it away"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("name", metavar="NAME", help="of the engine, as 'losa runtimes list' has it")
        action.set_defaults(command=command)


def _list_runtimes(_: argparse.Namespace) -> int:
    from losa_export.runtimes.environments import engine_states

    for name, text in (
        ("ort", "ONNX Runtime with our kernels: in this environment"),
        ("ort-stock", "ONNX Runtime without them: in this environment"),
        ("genai", "onnxruntime-genai: in this environment (extra 'genai')"),
        ("torch", "PyTorch, for checkpoints: in this environment (extra 'train')"),
    ):
        print(f"{name:<12}{text}")
    for state in engine_states():
        if state.installed:
            text = f"installed, {state.bytes / 1e6:.0f} MB in {state.folder}"
        else:
            text = state.obstacle or f"not installed; losa runtimes install {state.name}"
        print(f"{state.name:<12}{state.version}: {text}")
    return 0


def _install_runtime(arguments: argparse.Namespace) -> int:
    from losa_export.runtimes.environments import install_engine
    from losa_export.runtimes.isolated import isolated_engine

    folder = install_engine(isolated_engine(arguments.name), say=lambda line: print(line, file=sys.stderr))
    print(folder)
    return 0


def _remove_runtime(arguments: argparse.Namespace) -> int:
    from losa_export.runtimes.environments import remove_engine
    from losa_export.runtimes.isolated import isolated_engine

    freed = remove_engine(isolated_engine(arguments.name))
    print(f"{arguments.name}: {freed / 1e6:.0f} MB freed" if freed else f"{arguments.name}: nothing was installed")
    return 0


# ---- generate -----------------------------------------------------------------------------------------------------


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="ONNX", help="exported folder (or a checkpoint with --runtime torch)"
    )
    parser.add_argument("prompt", metavar="TEXT", help="what to continue, or a question to a chat model")
    parser.add_argument("--runtime", choices=("ort", "ort-stock", "torch"), default="ort", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    _add_threads(parser)
    parser.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from losa_export.runtimes.generate import GenerationConfig, generate_text

    config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        chat="never" if arguments.raw else "auto",
    )
    pieces = generate_text(
        arguments.model, arguments.prompt, config, runtime=arguments.runtime, threads=arguments.threads
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
