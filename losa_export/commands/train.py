"""`losa train`: dense checkpoint → run/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.commands.arguments import EXIT_INTERRUPTED, add_output, duration, fraction

if TYPE_CHECKING:
    from losa_export.training.config import TrainConfig


def add_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa train`."""
    # Options are named after the fields they set and have no default here: what the user leaves out comes from the
    # preset or config file, and else from TrainConfig.
    parser.epilog = (
        "An option given here wins over the preset or config file. Every other setting, and what each means: "
        "losa_export.training.config.TrainConfig; a run's config.toml is a config file with all of them."
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or hub id")
    _add_setting(
        parser, "--sparsity", "sparsity_fraction", fraction, "S", "zeros at the end, e.g. 0.5 or 50%%; 0: plain LoRA"
    )
    add_output(parser, None)
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
    _add_setting(
        text,
        "--spaced-fraction",
        "spaced_fraction",
        fraction,
        "S",
        "of the paragraphs, set punctuation off by spaces, as in tokenised corpora such as WikiText (default: 0.0)",
    )
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
        fraction,
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
        duration,
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
        "exact gradients; exact_bf16: one product of three in bfloat16; auto: that where the processor multiplies it; lors: "
        "none of it, and no mask in them (default: exact)",
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
    _add_switch(
        tuning,
        "--shard-weights",
        "shard_weights",
        "share the frozen weights out over the processes of 'accelerate launch' or torchrun (default: no)",
    )
    _add_setting(tuning, "--seed", "seed", int, "N", "default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument(
        "--plot", action="store_true", help="draw sparsity, rank and error of the blocks over the rounds: rounds.png"
    )
    parser.set_defaults(command=_train)


def _auto_or_fraction(text: str) -> float | None:
    return None if text == "auto" else fraction(text)


_Options = argparse.ArgumentParser | argparse._ArgumentGroup


def _add_setting(
    parser: _Options, flag: str, field: str, kind: Callable[[str], Any], metavar: str, text: str, **more: Any
) -> None:
    parser.add_argument(flag, dest=field, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text, **more)


def _add_switch(parser: _Options, flag: str, field: str, text: str) -> None:
    parser.add_argument(flag, dest=field, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)


def train_config(arguments: argparse.Namespace) -> TrainConfig:
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
    code = _train_and_tell(arguments)
    from losa_export.training.processes import end_launched

    end_launched(code)
    return code


def _train_and_tell(arguments: argparse.Namespace) -> int:
    from losa_export.progress import duration

    config = train_config(arguments)
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
