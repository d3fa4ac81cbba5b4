"""How long a training step under a mask takes, beside PEFT's LoRA without one: `python -m losa_export.eval.step_bench`.

Both adapt the same linears of the same random model, with the same loss, optimizer and library of matrix products, in
one process and in turns, so that a slow moment of the machine meets them alike. Peak memory needs a process each, for a
peak does not come down.

What to expect, in matrix products as large as a linear's forward pass: PEFT's LoRA needs two, and a few more as thin as
the rank, in shapes that are slow; "lors" two; "exact" three, since the mask forbids to factor the adapters' gradients;
"exact_bf16" takes the third one in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from losa_export.errors import ConfigError, LosaError, MissingDependencyError
from losa_export.eval.stats import median, median_absolute_deviation
from losa_export.layout import LLAMA

if TYPE_CHECKING:
    from losa_export.training.products import Library

VARIANTS = ("exact", "exact_bf16", "lors", "peft")
_WARMUP_STEPS = 2
_MEMORY_STEPS = 3
_VOCABULARY = 8192

Step = Callable[[], None]


@dataclass(frozen=True)
class StepBenchConfig:
    """What is measured.

    Attributes:
        hidden: width of the model, a multiple of 64.
        intermediate: width inside its MLPs.
        blocks: decoder blocks.
        batch: windows in a step.
        window: tokens in a window.
        rank: of the adapters.
        sparsity_fraction: zeros under the mask; PEFT's linears stay dense.
        rounds: measured steps of each variant.
        threads: compute threads; None leaves PyTorch's own number.
        compute: dtype of weights and activations. PEFT's adapters are of that dtype too, its fastest form; ours are
            float32, as in training.
        default_products: leave float32 products to PyTorch's choice of library, rather than to that of training.
        seed: of weights, masks and tokens.
    Raises: ConfigError naming the field that is out of range.
    """

    hidden: int = 576
    intermediate: int = 1536
    blocks: int = 4
    batch: int = 4
    window: int = 256
    rank: int = 8
    sparsity_fraction: float = 0.7
    rounds: int = 20
    threads: int | None = None
    compute: Literal["fp32", "bf16"] = "fp32"
    default_products: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("intermediate", "blocks", "batch", "rank", "rounds"):
            self._require(name, getattr(self, name) >= 1, "it must be at least 1")
        self._require("window", self.window >= 2, "it must be at least 2")
        self._require("hidden", self.hidden >= 64 and self.hidden % 64 == 0, "it must be a multiple of 64")
        self._require("sparsity_fraction", 0.0 <= self.sparsity_fraction < 1.0, "it must lie in [0, 1)")
        self._require("compute", self.compute in ("fp32", "bf16"), "choose one of fp32, bf16")
        self._require("threads", self.threads is None or self.threads >= 1, "it must be at least 1")

    @property
    def products(self) -> Library:
        """The library that multiplies float32 matrices, for all variants."""
        from losa_export.training.products import product_library

        return "default" if self.default_products else product_library()

    def _require(self, field: str, condition: bool, mend: str) -> None:
        if not condition:
            value = getattr(self, field)
            raise ConfigError(f"{field} is {value!r}; {mend}", field=field, value=value)


@dataclass(frozen=True)
class StepTimes:
    """One variant's measurements.

    Attributes:
        variant: one of `VARIANTS`.
        seconds: of every measured step, in order.
        peak_rss_bytes: largest resident size of a process that does nothing else, PyTorch's own code included.
    """

    variant: str
    seconds: tuple[float, ...]
    peak_rss_bytes: int

    @property
    def median_ms(self) -> float:
        """Median time of a step."""
        return 1000.0 * median(self.seconds)

    @property
    def mad_ms(self) -> float:
        """Median distance from the median."""
        return 1000.0 * median_absolute_deviation(self.seconds)


def bench_steps(config: StepBenchConfig, *, clock: Callable[[], float] = time.perf_counter) -> tuple[StepTimes, ...]:
    """Measure all variants, in turns that begin with another one each round.

    Raises: MissingDependencyError without torch, transformers or peft.
    """
    from losa_export.training.products import fast_products

    peaks = [_in_own_process(config, variant) for variant in VARIANTS]
    steps = [make_step(config, variant) for variant in VARIANTS]
    seconds: list[list[float]] = [[] for _ in VARIANTS]
    with fast_products(config.products):
        for step in steps:
            for _ in range(_WARMUP_STEPS):
                step()
        for number in range(config.rounds):
            for place in range(len(VARIANTS)):
                variant = (number + place) % len(VARIANTS)
                started = clock()
                steps[variant]()
                seconds[variant].append(clock() - started)
    return tuple(StepTimes(name, tuple(seconds[i]), peaks[i]) for i, name in enumerate(VARIANTS))


def make_step(config: StepBenchConfig, variant: str) -> Step:
    """A function that does one training step: forward, backward, AdamW.

    Raises: MissingDependencyError without torch, transformers or peft; ConfigError for another variant.
    """
    if variant not in VARIANTS:
        raise ConfigError(
            f"variant is {variant!r}; choose one of {', '.join(VARIANTS)}", field="variant", value=variant
        )
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingDependencyError.for_extra(str(error.name), "train", "timing a training step") from None
    from losa_export.training.loss import CausalLoss

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.blocks,
        num_attention_heads=config.hidden // 64,
        num_key_value_heads=config.hidden // 64,
        vocab_size=_VOCABULARY,
        max_position_embeddings=max(64, config.window),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(shape).eval().requires_grad_(False)
    if config.compute == "bf16":
        model.bfloat16()
    if variant == "peft":
        _adapt_by_peft(model, config)
    else:
        _adapt_by_mask(model, config, variant)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    loss = CausalLoss(model)
    ids = torch.randint(_VOCABULARY, (config.batch, config.window))

    def step() -> None:
        loss(ids).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adapt_by_peft(model: Any, config: StepBenchConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingDependencyError.for_extra("peft", "peft", "the comparison with PEFT's LoRA") from None
    names = [path.rpartition(".")[2] for path in LLAMA.linears]
    settings = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, lora_dropout=0.0, target_modules=names)
    inject_adapter_in_model(settings, model)


def _adapt_by_mask(model: Any, config: StepBenchConfig, operator: Any) -> None:
    import torch

    from losa_export.training.adapter import MaskedLoRALinear

    generator = torch.Generator().manual_seed(config.seed)
    for block in model.get_submodule(LLAMA.blocks).children():
        for path in LLAMA.linears:
            parent, _, attribute = path.rpartition(".")
            layer = MaskedLoRALinear(
                block.get_submodule(path),
                max_rank=config.rank,
                rank=config.rank,
                scaling=2.0,
                generator=generator,
                operator=operator,
            )
            layer.set_mask(torch.rand(layer.mask.shape, generator=generator) >= config.sparsity_fraction)
            setattr(block.get_submodule(parent), attribute, layer)


def _in_own_process(config: StepBenchConfig, variant: str) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_rss_bytes, (config, variant))


def peak_rss_bytes(config: StepBenchConfig, variant: str) -> int:
    """Largest resident size of this process after some steps of `variant`."""
    from losa_export.training.products import fast_products

    step = make_step(config, variant)
    with fast_products(config.products):
        for _ in range(_MEMORY_STEPS):
            step()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(results: Sequence[StepTimes]) -> str:
    """A Markdown table of the results, with each time beside PEFT's."""
    peft = next(result for result in results if result.variant == "peft")
    lines = [
        "| step | median ms | ± MAD | time / PEFT | peak RSS MiB | RSS / PEFT |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {result.variant} | {result.median_ms:.1f} | {result.mad_ms:.1f} | {_paired_ratio(result, peft):.3f} | "
        f"{result.peak_rss_bytes / 2**20:.0f} | {result.peak_rss_bytes / peft.peak_rss_bytes:.2f} |"
        for result in results
    ]
    return "\n".join(lines)


def _paired_ratio(result: StepTimes, peft: StepTimes) -> float:
    """Median over the rounds of the ratio within a round, which a slow moment of the machine changes little."""
    return median([mine / other for mine, other in zip(result.seconds, peft.seconds, strict=True)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m losa_export.eval.step_bench", description=(__doc__ or "").split(":")[0]
    )
    for field in dataclasses.fields(StepBenchConfig):
        flag = f"--{field.name.removesuffix('_fraction').replace('_', '-')}"
        if field.name == "default_products":
            parser.add_argument(flag, action="store_true", help="float32 products by PyTorch's own choice of library")
            continue
        kind = {"sparsity_fraction": float, "compute": str}.get(field.name, int)
        parser.add_argument(flag, dest=field.name, type=kind, default=field.default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write every step's time here as well")
    arguments = vars(parser.parse_args(argv))
    destination = arguments.pop("json")
    try:
        config = StepBenchConfig(**arguments)
        results = bench_steps(config)
    except LosaError as error:
        sys.stderr.write(f"step_bench: error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{table(results)}\n\nfloat32 products by library: {config.products}\n")
    if destination is not None:
        record = {
            "config": {**dataclasses.asdict(config), "products": config.products},
            "results": [dataclasses.asdict(result) for result in results],
        }
        destination.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
