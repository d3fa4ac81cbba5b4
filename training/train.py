"""Dense checkpoint in, masks and adapters out: rounds of pruning and fine-tuning that survive a crash."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from losa_export.base_weights import WEIGHTS_FILE
from losa_export.errors import ConfigError, StateError
from losa_export.files import check_output, disk_errors, write_text_atomic
from losa_export.progress import Progress, duration
from losa_export.training import base_weights
from losa_export.training.allocation import (
    NEED_ERRORS,
    NEED_OUTLIERS,
    NEED_RMI,
    RankInputs,
    SparsityInputs,
    allocate_ranks,
    allocate_sparsity,
    ask_ranks,
)
from losa_export.training.config import CONFIG_FILE, TrainConfig, to_table, write_toml
from losa_export.training.heap import keep_freed_memory, return_freed_memory
from losa_export.training.journal import JOURNAL_FILE, RoundRecord, write_journal
from losa_export.training.loop import Tuner, TuningData
from losa_export.training.loss import Losses
from losa_export.training.measure import Measurements, measure_blocks
from losa_export.training.model import AdaptedModel, choose_compute, choose_device, choose_operator, load_adapted_model
from losa_export.training.outputs import ADAPTER_FOLDER, MASKS_FILE, write_outputs
from losa_export.training.plot import PLOT_FILE
from losa_export.training.preflight import TrainInputs, check_inputs, one_shot_config
from losa_export.training.processes import Processes
from losa_export.training.products import Library, fast_products, product_library
from losa_export.training.prune import prune_blocks
from losa_export.training.reconstruct import Reconstructor, ReconstructSettings
from losa_export.training.rule import PruneRule
from losa_export.training.schedule import (
    PROVISIONAL_STEPS,
    RoundPlan,
    round_spans,
    sparsity_at,
    split_steps,
    steps_in,
)
from losa_export.training.sharding import share_out
from losa_export.training.sparsity_allocators import redundancy
from losa_export.training.state import (
    STATE_FOLDER,
    RunState,
    check_fingerprint,
    drop_spare,
    load_state,
    save_state,
)
from losa_export.training.stop import StoppedError, StopRequest

# With a time budget, a round is planned anew when the plan misses its share by more than this part.
_REPLAN_TOLERANCE = 0.1
_MEASURED_STEPS = 2
_OUTPUT_FILES = (MASKS_FILE, WEIGHTS_FILE, JOURNAL_FILE, PLOT_FILE, CONFIG_FILE)
# In the folder of the state: weights that changed, while their block is not at work.
_PARKING = "parked"

_Held = Literal["all", "one at a time", "shared out"]


@dataclass(frozen=True)
class TrainResult:
    """What became of a run.

    Attributes:
        run: the run folder.
        status: "interrupted" if it was asked to stop; it can be resumed then.
        rounds: the finished rounds.
        elapsed_seconds: working time over all sessions.
    """

    run: Path
    status: Literal["completed", "interrupted"]
    rounds: tuple[RoundRecord, ...]
    elapsed_seconds: float

    @property
    def sparsity_fraction(self) -> float:
        """Zeros among all block linears after the last finished round."""
        return self.rounds[-1].sparsity_fraction if self.rounds else 0.0

    @property
    def masks_file(self) -> Path:
        """The masks of a completed run."""
        return self.run / MASKS_FILE

    @property
    def adapter_folder(self) -> Path:
        """The adapters of a completed run, in PEFT's layout."""
        return self.run / ADAPTER_FOLDER


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, for those who watch. `step` counts from 0 within the round; `loss` is that before it.

    `terms` are the parts of the loss as `RoundRecord.loss_terms` names them, where it has more than one.
    """

    round_number: int
    step: int
    loss: float
    learning_rate: float
    terms: Mapping[str, float] = field(default_factory=dict)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    show_progress: bool = True,
    on_step: Callable[[StepRecord], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainResult:
    """Prune and fine-tune a dense checkpoint (LoSA), into the run folder `config.output`.

    Args:
        config: what to do.
        resume: go on with the run in `config.output` instead of starting one. Masks and losses are then those
            of a run that was never interrupted, bit for bit on the same machine and thread count. With a time
            budget that holds for the planned steps: a machine that slows down changes the plan.
        show_progress: report on standard error.
        on_step: told of every optimizer step.
        clock: seconds, monotonic.
    Returns: the result; status "interrupted" after SIGINT or SIGTERM, once the state is saved.
    Raises:
        InputError and its kinds: the model or a text cannot be used.
        ConfigError: a field does not fit the model or the machine.
        OutputError: the run folder cannot be written, or holds something already.
        StateError: nothing to resume, a damaged state, or one of other settings, model or texts.
    """
    config = config.absolute()
    state, tensors = RunState(), {}
    if not resume:
        check_output(config.output, overwrite=config.overwrite, inputs=[config.model, *config.tuning_text])
    saved = load_state(config.output) if resume else None
    accelerator = _accelerator(config)
    inputs = check_inputs(config)
    accelerator.wait_for_everyone()
    if saved is not None:
        check_fingerprint(config.output, saved.fingerprint, inputs.fingerprint)
        state, tensors = saved.state, dict(saved.tensors)
        if state.phase == "complete":
            return _finished(config, state)
        if accelerator.is_main_process:
            _sweep(config.output)
    elif accelerator.is_main_process:
        _clear(config.output)
        _sweep(config.output)
        save_state(config.output, state, {}, inputs.fingerprint)
    session = _Session(config, inputs, state, accelerator, show_progress, on_step, clock)
    try:
        with fast_products(session.products), StopRequest(echoed=session.processes.count > 1) as stop:
            session.run(tensors, stop)
    except StoppedError:
        return TrainResult(config.output, "interrupted", tuple(state.records), state.elapsed_seconds)
    return TrainResult(config.output, "completed", tuple(state.records), state.elapsed_seconds)


def one_shot(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Prune once to the final sparsity by `criterion`, without tuning: the baseline.

    The run folder is like any other; its adapters are zero.
    """
    return train(one_shot_config(config), show_progress=show_progress)


def _accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Buffers, the masks among them, change in the pruning step alone, which sees to it that all processes agree.
    settings = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=choose_device(config.device).type == "cpu", kwargs_handlers=[settings])
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {accelerator.num_processes} processes cannot share evenly; "
            "choose a multiple",
            field="batch_size",
        )
    if config.shard_weights and accelerator.num_processes == 1:
        raise ConfigError(
            "shard_weights is on, but this is the only process; start several with 'accelerate launch' or torchrun, or "
            "leave it out",
            field="shard_weights",
        )
    return accelerator


def _finished(config: TrainConfig, state: RunState) -> TrainResult:
    for path in (config.output / MASKS_FILE, config.output / ADAPTER_FOLDER):
        if not path.exists():
            raise StateError(
                f"run '{config.output}' is finished, but its '{path.name}' is gone; start again with --overwrite",
                path=path,
            )
    return TrainResult(config.output, "completed", tuple(state.records), state.elapsed_seconds)


def _clear(run: Path) -> None:
    """Remove an earlier run's files, and nothing else that may lie in the folder. The state goes last."""
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        for name in _OUTPUT_FILES:
            (run / name).unlink(missing_ok=True)
        for name in (ADAPTER_FOLDER, STATE_FOLDER):
            if (run / name).is_dir():
                shutil.rmtree(run / name)


def _sweep(run: Path) -> None:
    """Remove what a killed process had begun to write: an output's name between a dot and a random end."""
    with disk_errors(run):
        for name in (*_OUTPUT_FILES, ADAPTER_FOLDER):
            for path in run.glob(f".{name}.*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Session:
    """One stretch of work on a run, from where its state stands to the end or to a stop."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: TrainInputs,
        state: RunState,
        accelerator: Any,
        show_progress: bool,
        on_step: Callable[[StepRecord], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.inputs, self.state = config, inputs, state
        self.on_step, self.clock = on_step, clock
        self.accelerator = accelerator
        self.processes = Processes(accelerator)
        self.products: Library = product_library() if accelerator.device.type == "cpu" else "default"
        self.held = self._held()
        self.writes = bool(self.accelerator.is_main_process)
        self.shows = show_progress and self.writes
        self.compute = choose_compute(config.compute, config.dtype, self.accelerator.device)
        self.spans = round_spans(config.rounds, config.final_round_share)
        self.planned = split_steps(self._total_steps(), self.spans)
        self.ticked = clock()
        self.saved_at = self.state.elapsed_seconds
        self.adapted: AdaptedModel
        self.tuner: Tuner

    def _held(self) -> _Held:
        """Which blocks are in this process's memory: one at a time where nothing is tuned and each needed in turn."""
        if self.config.shard_weights:
            return "shared out"
        return "one at a time" if self.config.steps == 0 and self.processes.count == 1 else "all"

    def run(self, tensors: dict[str, Tensor], stop: StopRequest) -> None:
        """Load the model and go through the remaining rounds."""
        self._write_records()
        if self.held == "shared out":
            return_freed_memory()
        parking = None if self.held == "all" else self.config.output / STATE_FOLDER / _PARKING
        self.adapted = load_adapted_model(self.config, self.compute, parking=parking)
        self.adapted.model.to(self.accelerator.device)
        if self.held == "shared out":
            self.adapted = share_out(self.adapted, self.processes.count)
        try:
            self._go_through(tensors, stop)
        finally:
            if self.adapted.store is not None:
                self.adapted.store.clear()

    def _go_through(self, tensors: dict[str, Tensor], stop: StopRequest) -> None:
        if self.held == "all":
            keep_freed_memory()
        data = TuningData(self.inputs.tuning, self.config.batch_size, self.config.seed)
        self.tuner = Tuner(self.adapted, data, self.config, self.accelerator)
        self._restore(tensors)
        self.tick()
        while self.state.phase != "complete":
            if self.state.phase == "prune":
                self._prune(stop)
            self._tune(stop)
            self._finish_round()
        if self.writes:
            write_outputs(self.config.output, self.adapted, self.config.model, self._mask_metadata())
        else:
            self.adapted.lend_changed_weights()
        self.save(keep_tensors=False)
        if self.writes:
            drop_spare(self.config.output)
        self.accelerator.wait_for_everyone()

    def tick(self) -> float:
        """Add the time since the last tick to the run's working time. Returns: those seconds.

        Several processes go by the first one's clock, or they would plan different numbers of steps.
        """
        now = self.clock()
        passed, self.ticked = self.processes.first(now - self.ticked), now
        self.state.elapsed_seconds += passed
        return passed

    def _check(self, stop: StopRequest) -> None:
        """Raises: StoppedError in every process if one of them was asked to stop."""
        if self.processes.any(stop.requested):
            raise StoppedError

    def save(self, *, keep_tensors: bool = True) -> None:
        """Write the state to the disk."""
        self.tick()
        if self.writes:
            tensors = self._tensors() if keep_tensors else {}
            save_state(self.config.output, self.state, tensors, self.inputs.fingerprint)
        elif keep_tensors:
            self.adapted.lend_changed_weights()
        self.saved_at = self.state.elapsed_seconds

    def _prune(self, stop: StopRequest) -> None:
        state, config = self.state, self.config
        target = sparsity_at(config.sparsity_fraction, state.round_number, config.rounds)
        counts = self.adapted.parameter_counts()
        previous = np.array(state.block_targets or [0.0] * counts.size, dtype=np.float64)
        self.tick()
        measured = self._measure(stop)
        passed = self.tick()
        state.measure_seconds = 0.0 if measured.empty else passed
        targets = allocate_sparsity(
            config.sparsity_allocator,
            target,
            SparsityInputs(
                state.round_number,
                config.rounds,
                counts,
                previous,
                rmi=measured.rmi,
                outliers=measured.outliers,
                half_width=config.sparsity_band,
                owl_spread=config.owl_spread,
                atp_difference=config.atp_difference,
                block_sparsities=np.array(config.block_sparsities) if config.block_sparsities else None,
            ),
        )
        targets = self.processes.first(targets)
        reconstructor = self._reconstructor()
        self._check(stop)
        title = f"round {state.round_number}/{config.rounds}, pruning to {target:.1%}"
        self.tick()
        with Progress(title, counts.size, "blocks", enabled=self.shows) as progress:

            def on_block(block: int) -> None:
                if reconstructor is None:
                    progress.advance()
                else:
                    progress.advance(error=str(reconstructor.results[block]))
                self._check(stop)

            errors = prune_blocks(
                self.adapted,
                torch.from_numpy(self.inputs.calibration),
                targets,
                batch_size=config.batch_size,
                rule=PruneRule.of(config),
                errors=config.error_kind if config.rank_allocator in NEED_ERRORS else None,
                on_block=on_block,
                reconstructor=reconstructor,
            )
        errors = self.processes.first(errors)
        ranks_before = np.array(state.block_ranks or [config.rank] * counts.size, dtype=np.int64)
        mean_rank = config.mean_rank(state.round_number)
        rank_inputs = RankInputs(state.round_number, config.rounds, 1, config.max_rank, ranks_before, errors)
        ranks = allocate_ranks(config.rank_allocator, mean_rank, rank_inputs)
        state.block_targets, state.block_ranks = targets.tolist(), ranks.tolist()
        state.block_ranks_asked = ask_ranks(mean_rank, rank_inputs).tolist()
        state.block_errors = [] if errors is None else errors.tolist()
        state.block_outliers = [] if measured.outliers is None else measured.outliers.tolist()
        state.rmi = [] if measured.rmi is None else measured.rmi.tolist()
        fits = reconstructor.results if reconstructor is not None else []
        state.block_fits = [(fit.error_before, fit.error_after) for fit in fits]
        # What the blocks have just been fitted to must not leave with the ranks that shrink.
        self.tuner.resize(self._layer_ranks(), absorb=reconstructor is not None)
        self._agree()
        state.prune_seconds = state.measure_seconds + self.tick()
        state.plan, state.allotted_seconds = self._plan_round()
        state.phase = "tune"
        self.save()

    def _agree(self) -> None:
        """Take over the first process's masks, weights, adapters and moments, as its pruning has left them."""
        if self.processes.count == 1:
            return
        for layer in self.adapted.layers.values():
            kept = layer.kept.to(torch.uint8)
            self.processes.copy_first([kept])
            layer.set_mask(kept.bool())
        # What is shared out is the first process's already.
        weights = self.adapted.changed_weights().values() if self.adapted.store is None else ()
        self.processes.copy_first([*weights, *self.tuner.tensors().values()])

    def _measure(self, stop: StopRequest) -> Measurements:
        """What the sparsity allocator wants to know of the model as the last round left it."""
        state, config = self.state, self.config
        blocks = len(self.adapted.blocks)
        rmi = config.sparsity_allocator in NEED_RMI and blocks > 1
        outliers = config.sparsity_allocator in NEED_OUTLIERS
        if not rmi and not outliers:
            return Measurements()
        windows = torch.from_numpy(self.inputs.calibration)
        title = f"round {state.round_number}/{config.rounds}, measuring"
        with Progress(title, blocks, "blocks", enabled=self.shows) as progress:

            def on_block(_: int) -> None:
                progress.advance()
                self._check(stop)

            return measure_blocks(
                self.adapted,
                windows[: config.windows_for_rmi] if rmi else windows,
                batch_size=config.batch_size,
                rmi=rmi,
                debiased=config.rmi_debiased,
                normalise=config.rmi_normalise,
                outlier_factor=config.owl_outlier_factor if outliers else None,
                on_block=on_block,
            )

    def _reconstructor(self) -> Reconstructor | None:
        """What fits the blocks of this round's pruning, if it is to be done in this round."""
        config, number = self.config, self.state.round_number
        settings = _reconstruct_settings(config)
        if settings is None or (config.reconstruct_rounds == "last" and number < config.rounds):
            return None
        return Reconstructor(settings, (config.seed, number))

    def _prune_seconds_left(self) -> float:
        """What the pruning of the rounds to come will take, as this round's did.

        Where only the last one fits the blocks too, that is estimated: pruning alone is two passes.
        """
        state, config = self.state, self.config
        left = config.rounds - state.round_number
        settings = _reconstruct_settings(config)
        if settings is None or config.reconstruct_rounds == "every" or left == 0:
            return left * state.prune_seconds
        return (left + settings.passes / 2) * state.prune_seconds

    def _plan_round(self) -> tuple[RoundPlan, float | None]:
        """Steps of the round that begins, and its share of the time budget, if there is one."""
        state, config = self.state, self.config
        index = state.round_number - 1
        steps, allotted = self.planned[index], None
        if config.time_budget_seconds is not None and steps > 0:
            tuning_left = max(0.0, config.time_budget_seconds - state.elapsed_seconds - self._prune_seconds_left())
            start, end = self.spans[index]
            allotted = tuning_left * (end - start) / (1.0 - start)
            fitting = PROVISIONAL_STEPS
            if state.seconds_per_step is not None:
                fitting = steps_in(allotted, state.seconds_per_step)
            steps = min(steps, fitting)
        if config.learning_rate_schedule == "per_round":
            return RoundPlan.of_its_own(steps, config.warmup_fraction), allotted
        return RoundPlan.of_round(self.spans[index], steps, config.warmup_fraction), allotted

    def _tune(self, stop: StopRequest) -> None:
        state, config = self.state, self.config
        assert state.plan is not None  # set by _prune, and saved with the phase
        title = f"round {state.round_number}/{config.rounds}, tuning at {self.adapted.sparsity_fraction():.1%}"
        timed = state.allotted_seconds is not None
        total = state.allotted_seconds if state.allotted_seconds is not None else float(state.plan.end_step)
        self.tick()
        with Progress(title, total, "s" if timed else "steps", enabled=self.shows and total > 0) as progress:
            progress.advance(state.tune_seconds if timed else state.step)
            while state.step < state.plan.end_step:
                rate = config.learning_rate * state.plan.rate_factor(state.step)
                losses = self.tuner.step(state.total_steps, rate)
                seconds = self.tick()
                state.losses.append(losses.total)
                terms = self._terms(losses)
                for name, value in terms.items():
                    state.loss_terms.setdefault(name, []).append(value)
                state.tune_seconds += seconds
                state.step += 1
                state.total_steps += 1
                self._replan()
                self._show(progress, losses.total, terms, seconds, timed)
                if self.on_step is not None:
                    self.on_step(StepRecord(state.round_number, state.step - 1, losses.total, rate, terms))
                due = state.elapsed_seconds - self.saved_at >= config.save_every_seconds
                stopping = self.processes.any(stop.requested)
                if (due or stopping) and state.step < state.plan.end_step:
                    self.save()
                    if stopping:
                        raise StoppedError

    def _terms(self, losses: Losses[float]) -> dict[str, float]:
        """What a loss is made of, by name, if that is more than the cross-entropy."""
        asked = {"kl": self.config.kl_weight > 0.0, "squarehead": self.config.squarehead_weight > 0.0}
        names = [name for name, wanted in asked.items() if wanted]
        return {name: getattr(losses, name) for name in ("cross_entropy", *names)} if names else {}

    def _replan(self) -> None:
        """With a time budget, correct the number of steps when the measured speed asks for it."""
        state = self.state
        if state.allotted_seconds is None or state.plan is None:
            return
        # Not at the very end either: steps added there would run at the rate of the round's end, zero in the last.
        if not _MEASURED_STEPS <= state.step < state.plan.end_step:
            return
        speed = state.tune_seconds / state.step
        left = state.allotted_seconds - state.tune_seconds
        fitting = state.step + max(0, int(left / speed))
        fitting = min(fitting, self.planned[state.round_number - 1])
        first = state.seconds_per_step is None and state.step == _MEASURED_STEPS
        if first or abs(fitting - state.plan.end_step) > max(1.0, _REPLAN_TOLERANCE * state.plan.end_step):
            state.plan = state.plan.corrected(state.step, fitting)

    def _show(self, progress: Progress, loss: float, terms: Mapping[str, float], seconds: float, timed: bool) -> None:
        tokens = self.tuner.tokens(self.state.total_steps - 1)
        fields = {"loss": f"{loss:.3f}", **{name.replace("_", "-"): f"{value:.3f}" for name, value in terms.items()}}
        fields["tokens/s"] = f"{tokens / max(seconds, 1e-9):.0f}"
        left = self._seconds_left()
        if left is not None:
            fields["whole run"] = f"{duration(left)} left"
        progress.advance(seconds if timed else 1, **fields)

    def _seconds_left(self) -> float | None:
        state, config = self.state, self.config
        if config.time_budget_seconds is not None:
            return max(0.0, config.time_budget_seconds - state.elapsed_seconds)
        if state.step == 0 or state.plan is None:
            return None
        steps = sum(self.planned[state.round_number :]) + state.plan.end_step - state.step
        return steps * state.tune_seconds / state.step + self._prune_seconds_left()

    def _finish_round(self) -> None:
        state, config = self.state, self.config
        state.records.append(self._record())
        if state.step > 0:
            state.seconds_per_step = state.tune_seconds / state.step
        state.step, state.losses, state.loss_terms, state.plan = 0, [], {}, None
        state.tune_seconds = state.prune_seconds = state.measure_seconds = 0.0
        if state.round_number == config.rounds:
            # Not saved yet: a crash from here on repeats the end of the round and the writing of the outputs.
            state.phase = "complete"
        else:
            state.round_number += 1
            state.phase = "prune"
            if config.learning_rate_schedule == "per_round":
                self.tuner.forget_moments()
            self.save()
        if self.writes:
            write_journal(config.output, state.records)

    def _record(self) -> RoundRecord:
        state, config = self.state, self.config
        assert state.plan is not None  # the round has been pruned
        masks = self.adapted.layers.items()
        last = state.plan.rate_factor(state.step - 1) * config.learning_rate if state.step else None
        return RoundRecord(
            round_number=state.round_number,
            target_sparsity=sparsity_at(config.sparsity_fraction, state.round_number, config.rounds),
            sparsity_fraction=self.adapted.sparsity_fraction(),
            block_targets=tuple(state.block_targets),
            block_ranks=tuple(state.block_ranks),
            block_fits=tuple(state.block_fits),
            mean_rank=config.mean_rank(state.round_number),
            block_ranks_asked=tuple(state.block_ranks_asked),
            block_errors=tuple(state.block_errors),
            block_outliers=tuple(state.block_outliers),
            rmi_row_sums=tuple(redundancy(np.array(state.rmi)).tolist()) if state.rmi else (),
            measure_seconds=state.measure_seconds,
            sparsity={name: 1.0 - float(layer.kept.mean(dtype=torch.float64)) for name, layer in masks},
            steps=state.step,
            tokens=sum(self.tuner.tokens(state.total_steps - state.step + step) for step in range(state.step)),
            losses=tuple(state.losses),
            loss_terms={name: tuple(values) for name, values in state.loss_terms.items()},
            learning_rate_last=last,
            prune_seconds=state.prune_seconds,
            tune_seconds=state.tune_seconds,
            peak_memory_bytes=_peak_memory_bytes(self.accelerator.device),
        )

    def _total_steps(self) -> int:
        """Steps of all rounds, or with a time budget the most there may be."""
        if self.config.steps is not None:
            return self.config.steps
        if self.config.time_budget_seconds is not None:
            return sys.maxsize >> 32
        return max(self.config.rounds, -(-len(self.inputs.tuning) // self.config.batch_size))

    def _tensors(self) -> dict[str, Tensor]:
        saved = self.tuner.tensors()
        for name, layer in self.adapted.layers.items():
            saved[f"mask:{name}"] = torch.from_numpy(layer.packed_mask())
        saved |= base_weights.state_tensors(self.adapted)
        saved["rng:cpu"] = torch.get_rng_state()
        return saved

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        try:
            anew = self.config.learning_rate_schedule == "per_round"
            self.tuner.restore(tensors, self.state.step if anew else self.state.total_steps)
            for name, layer in self.adapted.layers.items():
                packed = tensors[f"mask:{name}"].numpy()
                bits = np.unpackbits(packed, count=layer.size, bitorder="little").astype(np.bool_)
                layer.set_mask(torch.from_numpy(bits).reshape(layer.out_features, layer.in_features))
            base_weights.restore(self.adapted, tensors)
            torch.set_rng_state(tensors["rng:cpu"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise StateError(
                f"the training state of '{self.config.output}' lacks or misshapes a tensor ({error}); start again "
                "with --overwrite",
                run=self.config.output,
            ) from error
        self._apply_ranks()

    def _apply_ranks(self) -> None:
        if self.state.block_ranks:
            self.tuner.set_ranks(self._layer_ranks())

    def _layer_ranks(self) -> dict[str, int]:
        return {
            name: rank for block, rank in enumerate(self.state.block_ranks) for name in self.adapted.layers_of(block)
        }

    def _mask_metadata(self) -> dict[str, str]:
        hashes = self.inputs.weight_hashes
        return {
            "sparsity_fraction": repr(self.adapted.sparsity_fraction()),
            "base": str(self.config.model),
            **{f"base_sha256:{name}": value for name, value in hashes.items()},
        }

    def _write_records(self) -> None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
        tables: dict[str, dict[str, Any]] = {
            "train": to_table(self.config),
            "base": {
                "path": str(self.config.model),
                "architecture": self.inputs.spec.architecture,
                "weights_sha256": self.inputs.weight_hashes,
                "tokenizer_sha256": self.inputs.tokenizer_hash,
            },
            "environment": {
                **versions,
                "device": str(self.accelerator.device),
                "compute": self.compute,
                "operator": choose_operator(self.config.operator, self.accelerator.device),
                "float32_products": self.products,
                "threads": torch.get_num_threads(),
                "blocks_in_memory": self.held,
                "processes": int(self.accelerator.num_processes),
            },
        }
        if self.writes:
            write_text_atomic(self.config.output / CONFIG_FILE, write_toml(tables))
            write_journal(self.config.output, self.state.records)


def _reconstruct_settings(config: TrainConfig) -> ReconstructSettings | None:
    """How pruned blocks are fitted; None if they are not."""
    if config.reconstruct_epochs == 0 and not config.reconstruct_least_squares:
        return None
    return ReconstructSettings(
        config.reconstruct_epochs,
        config.reconstruct_learning_rate,
        config.reconstruct_target,
        config.reconstruct_least_squares,
    )


def _peak_memory_bytes(device: torch.device) -> int:
    import resource

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
