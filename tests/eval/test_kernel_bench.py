"""The kernel benchmark: weights as engines store them, checks, the timed loop, figures, and one tiny real run."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, field
from io import StringIO
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from losa_export.errors import (
    BenchmarkError,
    ConfigError,
    KernelError,
    MissingDependencyError,
    OutputError,
    RuntimeFailureError,
)
from losa_export.eval import kernel_bench, kernel_bench_engines
from losa_export.eval.kernel_bench import (
    KernelBenchConfig,
    bench_kernels,
    case_of,
    check_memory,
    last_cache_bytes,
    max_copies,
    may_be_cached,
)
from losa_export.eval.kernel_bench_engines import (
    PEERS,
    EngineSpec,
    Reference,
    build_engine,
    check_answers,
    check_distinct,
    data_folder,
    forced_row,
    peer_specs,
    require_packages,
    ring_copies,
)
from losa_export.eval.kernel_bench_report import case_title, kernel_rows, print_kernel_bench, ratio_text
from losa_export.eval.kernel_bench_shapes import SHAPE_GROUPS, Shape, parse_shapes
from losa_export.eval.kernel_bench_timing import TimingPlan, Timings, disturbed_blocks, drifts, measure
from losa_export.eval.kernel_bench_weights import (
    StoredWeight,
    ValueKind,
    bytes_per_weight,
    dense_float_weight,
    dynamic_int8_weight,
    group_size,
    nbits_weight,
    random_mask,
    random_weight,
    value_kind,
)
from losa_export.eval.machine import CacheLevel, machine_record
from losa_export.graph.formats import EncodedWeight, value_format
from losa_export.runtimes import native

KINDS = "fp32 bf16 int8 int8-a8 int4 int4-a8 dense-bf16 dense-int8 dense-int8-a8 dense-int4 dense-int4-a8".split()
SHAPES = [(16, 64), (40, 70), (33, 193), (5, 3), (128, 256)]


@pytest.fixture
def generator():
    return np.random.default_rng(3)


@pytest.fixture(scope="session")
def kernels():
    try:
        return native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")


def typed(weight: StoredWeight, tensors: dict) -> native.Weight:
    """The same weight for the typed door."""
    kind = weight.operator.removeprefix("SparseMatMul").removeprefix("DenseMatMul").lower()
    attributes = weight.attributes
    scaled = {name: attributes[name] for name in ("group", "activation_bits") if name in attributes}
    return native.Weight(
        kind,
        attributes["N"],
        attributes["K"],
        tensors.get("mask"),
        tensors["values"],
        tensors.get("block_offsets"),
        tensors.get("scales"),
        tensors.get("codebook"),
        **scaled,
    )


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_weight_is_what_the_exporter_would_store(name, shape, generator):
    kind = value_kind(name)
    weight = random_weight(kind, *shape, 0.6, generator)
    assert weight.operator == (value_format(kind.type).dense_op if kind.dense else value_format(kind.type).sparse_op)
    tensors = dict(weight.tensors)
    if kind.type == "bf16":
        import ml_dtypes

        tensors["values"] = tensors["values"].view(ml_dtypes.bfloat16)
    decoded, keep = value_format(kind.type).decode(EncodedWeight(tensors, weight.attributes))
    assert np.array_equal(decoded, weight.dense)
    assert keep.shape == shape
    assert not weight.dense[~keep].any()
    again = value_format(kind.type, group=group_size(shape[1]), activation_bits=kind.activation_bits or 16)
    assert set(again.tensor_names(weight.operator)) == set(tensors)
    assert list(tensors) == list(again.tensor_names(weight.operator))
    assert list(weight.attributes) == list(again.attribute_names(weight.operator))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rotation_is_a_sound_weight_with_rotated_outputs(name, shape, kernels, generator):
    weight = random_weight(value_kind(name), *shape, 0.5, generator)
    x = generator.standard_normal((3, shape[1]), dtype=np.float32)
    first = native.matmul(x, typed(weight, dict(weight.tensors)), row="scalar")
    assert weight.rotations == max(1, shape[0] // 16)
    for shift in range(weight.rotations):
        tensors = weight.rotated(shift)
        rotated = typed(weight, tensors)
        native.validate(rotated)
        # The same sums in the same order: not a bit may differ.
        assert np.array_equal(native.matmul(x, rotated, row="scalar"), weight.rotated_rows(first, shift))
        for tensor in ("mask", "values", "scales"):
            if shift and tensor in tensors:
                assert not np.array_equal(tensors[tensor], weight.tensors[tensor])


def test_without_zeros_masks_of_copies_still_differ(generator):
    weight = random_weight(value_kind("int4"), 64, 32, 0.0, generator)
    assert np.count_nonzero(weight.dense == 0) == 1
    masks = {weight.rotated(shift)["mask"].tobytes() for shift in range(weight.rotations)}
    assert len(masks) == weight.rotations == 4


@given(st.integers(1, 40), st.integers(1, 300), st.floats(0, 0.999), st.integers(0, 9))
def test_every_row_of_a_mask_keeps_the_same_number(rows, columns, sparsity, seed):
    mask = random_mask(rows, columns, sparsity, np.random.default_rng(seed))
    assert mask.shape == (rows, columns)
    assert set(mask.sum(axis=1)) == {max(1, columns - round(sparsity * columns))}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95])
def test_bytes_per_weight_are_those_that_are_stored(name, sparsity, generator):
    kind = value_kind(name)
    weight = random_weight(kind, 512, 1024, sparsity, generator)
    # A row keeps a whole number of 1024 columns; offsets, padding and the codebook are 600 bytes of half a million.
    assert weight.stored_bytes / weight.dense.size == pytest.approx(bytes_per_weight(kind, sparsity), abs=0.003)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_value_reads_back_from_its_name(name):
    assert value_kind(name).name == name


@pytest.mark.parametrize("name", ["int3", "", "fp32-a8", "bf16-a8", "dense-fp32", "int8-a16", "dense-"])
def test_an_unknown_kind_of_value_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"values: '{name}' is not a kind of value; choose fp32, bf16, int8 or int4"):
        value_kind(name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
def test_blockwise_levels_lie_within_half_a_step_of_the_weight(bits, block, generator):
    dense = generator.standard_normal((24, 200), dtype=np.float32)
    dense[3, :block] = 0
    weight = nbits_weight(dense, bits, block)
    step = weight.tensors["scales"].repeat(block, axis=1)[:, :200]
    assert np.all(np.abs(weight.dense - dense) <= step * 0.5001)  # the last digit of float32
    assert weight.tensors["B"].shape == (24, -(-200 // block), block * bits // 8)
    assert weight.tensors["B"].dtype == np.uint8


def test_dynamic_int8_levels_leave_room_for_sums_of_two_in_16_bits(generator):
    dense = generator.standard_normal((24, 200), dtype=np.float32)
    dense[5] = 0
    weight = dynamic_int8_weight(dense)
    assert weight.tensors["B"].shape == (200, 24)
    assert 2 * 255 * int(np.abs(weight.tensors["B"]).max()) < 2**15
    assert np.all(np.abs(weight.dense - dense) <= weight.tensors["b_scale"][:, None] * 0.5001)


@pytest.mark.parametrize("make", [dense_float_weight, dynamic_int8_weight, lambda dense: nbits_weight(dense, 4, 32)])
def test_a_peers_rotation_moves_rows_one_by_one(make, generator):
    dense = generator.standard_normal((6, 64), dtype=np.float32)
    weight = make(dense)
    moved = make(np.roll(dense, 2, axis=0))
    assert weight.rotations == 6
    for name, array in weight.rotated(2).items():
        assert np.array_equal(array, moved.tensors[name])
    outputs = generator.standard_normal((2, 6))
    assert np.array_equal(weight.rotated_rows(outputs, 2), np.roll(outputs, 2, axis=1))


# ---- shapes and options -------------------------------------------------------------------------------------------


def test_shapes_come_by_model_or_by_size_each_once():
    assert len(parse_shapes(["smollm2"])) == 5
    assert parse_shapes(["48x64", "48X64"]) == (Shape(48, 64),)
    both = parse_shapes(["2048x2048", "tinyllama"])
    assert both[0] == Shape(2048, 2048, ("tinyllama o",))
    assert len(both) == 5


def test_every_named_shape_has_whole_blocks_of_rows_so_that_rotations_are_exact():
    assert all(shape.rows % 16 == 0 for group in SHAPE_GROUPS.values() for shape in group)


@pytest.mark.parametrize("name", ["gpt2", "64", "64x", "x64", "64x64x64", "-1x64"])
def test_what_is_no_shape_is_refused(name):
    with pytest.raises(ConfigError, match=r"shapes: '.*' is neither a model \(smollm2, tinyllama, llama2-7b\)"):
        parse_shapes([name])


def test_a_shape_without_rows_is_refused():
    with pytest.raises(ConfigError, match="must have from 1 to"):
        parse_shapes(["0x64"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ()}, "shapes is empty"),
        ({"sparsities": (1.0,)}, "sparsities holds 1.0"),
        ({"sparsities": (-0.1,)}, "sparsities holds -0.1"),
        ({"sparsities": ()}, "sparsities is empty"),
        ({"tokens": ()}, "tokens is empty"),
        ({"tokens": (0,)}, "tokens holds 0"),
        ({"tokens": (True,)}, "tokens holds True"),
        ({"tokens": (5000,)}, "tokens holds 5000"),
        ({"values": ("int3",)}, "'int3' is not a kind of value"),
        ({"values": (), "peers": ()}, "values and peers are both empty"),
        ({"peers": ("onnx",)}, "peers: 'onnx' is not known; choose from ort-fp32"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"ring_mebibytes": 0}, "ring_mebibytes is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        KernelBenchConfig(**options)


def test_quick_lowers_only_what_was_not_given():
    config = KernelBenchConfig(quick=True, tokens=(3,))
    assert config.chosen_tokens == (3,)
    assert config.chosen_sparsities == (0.7,)
    assert config.plan.seconds < KernelBenchConfig().plan.seconds
    assert config.ring_bytes(10 << 20) == 20 << 20
    assert KernelBenchConfig().ring_bytes(10 << 20) == 256 << 20
    assert KernelBenchConfig().ring_bytes(100 << 20) == 300 << 20
    assert KernelBenchConfig(ring_mebibytes=7).ring_bytes(100 << 20) == 7 << 20


def test_a_kernel_row_that_this_cpu_lacks_is_refused(kernels):
    with pytest.raises(ConfigError, match="rows: 'mmx' is not a kernel row that this CPU runs; choose from"):
        bench_kernels(KernelBenchConfig(rows=("mmx",)), show_progress=False)


# ---- engines ------------------------------------------------------------------------------------------------------


def test_blocks_of_128_become_64_where_the_width_demands_it():
    wide, narrow = peer_specs(PEERS, 4096), peer_specs(PEERS, 576)
    assert [spec.name for spec in wide] == list(PEERS)
    assert [spec.name for spec in narrow if "block" in spec.name] == [
        "ort-int4-block32",
        "ort-int4-block64",
        "ort-int8-block32",
        "ort-int8-block64",
    ]
    assert [spec.name for spec in wide if spec.is_dense_int4] == ["ort-int4-block32", "ort-int4-block128"]


def test_an_engine_asked_for_twice_is_refused():
    spec = EngineSpec(value=value_kind("int8"), row="avx2")
    with pytest.raises(ConfigError, match="losa-int8@avx2 would be measured twice"):
        check_distinct([spec, spec])
    check_distinct([spec, *peer_specs(PEERS, 128)])


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"losa-export\[export\]"):
        require_packages([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(MissingDependencyError, match=r"'torch-fp32' needs the package 'torch'.*losa-export\[train\]"):
        require_packages(peer_specs(["torch-fp32"], 128))
    require_packages(peer_specs(["ort-fp32"], 128))


@given(st.integers(1, 1 << 30), st.integers(1, 1 << 30), st.integers(0, 5000))
def test_a_ring_exceeds_what_was_asked_for_unless_copies_are_limited(weight_bytes, ring_bytes, most):
    copies = ring_copies(weight_bytes, ring_bytes, most)
    assert 2 <= copies <= max(2, most)
    assert copies * weight_bytes > ring_bytes or copies == max(2, most)


def test_a_row_is_forced_only_inside(monkeypatch):
    monkeypatch.setenv("LOSA_KERNEL", "before")
    with forced_row("scalar"):
        assert os.environ["LOSA_KERNEL"] == "scalar"
    assert os.environ["LOSA_KERNEL"] == "before"
    with forced_row(""):
        assert os.environ["LOSA_KERNEL"] == "before"
    monkeypatch.delenv("LOSA_KERNEL")
    with pytest.raises(RuntimeError), forced_row("scalar"):
        raise RuntimeError
    assert "LOSA_KERNEL" not in os.environ


def test_data_files_need_room_and_leave_nothing_behind():
    with data_folder(1) as folder:
        (folder / "weights").write_bytes(b"1")
    assert not folder.exists()
    with pytest.raises(OutputError, match=r"need 1073741824.0 GiB for a moment.*smaller --ring"), data_folder(1 << 60):
        pass


def build(spec, tmp_path, *, rows=64, columns=96, tokens=3, ring=1 << 16, **options):
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((rows, columns), dtype=np.float32)
    x = generator.standard_normal((tokens, columns), dtype=np.float32)
    engine, reference = build_engine(spec, dense, ring, 1, generator, tmp_path, reference_x=x, **options)
    return engine, reference, x


@pytest.mark.parametrize("name", [*PEERS, *KINDS])
def test_every_engine_answers_right_from_every_copy(name, kernels, tmp_path):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    [spec] = peer_specs([name], 96) if name in PEERS else [EngineSpec(value=value_kind(name), sparsity=0.5)]
    engine, reference, x = build(spec, tmp_path)
    assert engine.copies > 2
    assert engine.copies * engine.weight_bytes > 1 << 16
    assert len(engine.outputs(x)) == engine.copies
    assert 0 < check_answers(engine, reference, x) <= spec.tolerance
    engine.prepare(x[:1])
    engine.run()
    engine.rest()
    engine.close()
    assert not list(tmp_path.iterdir())


def test_more_copies_than_rotations_come_from_several_draws(kernels, tmp_path):
    engine, reference, x = build(EngineSpec(value=value_kind("fp32"), sparsity=0.5), tmp_path, rows=32)
    assert len(reference.outputs) == -(-engine.copies // 2) > 1
    assert check_answers(engine, reference, x) > 0
    answers = {np.asarray(answer).tobytes() for answer in engine.outputs(x)}
    assert len(answers) == engine.copies


def test_a_slow_engine_gets_fewer_copies(kernels, tmp_path):
    engine, _, _ = build(EngineSpec(peer="ort-fp32"), tmp_path, max_run_s=1e-9)
    assert engine.copies == 2
    engine, _, _ = build(EngineSpec(peer="ort-fp32"), tmp_path, max_copies=3, ring=1 << 22)
    assert engine.copies == 3


def test_a_row_that_cannot_run_is_told_in_our_words(kernels, tmp_path):
    with pytest.raises(KernelError, match="no kernel row is called 'mmx'"):
        build(EngineSpec(value=value_kind("fp32"), row="mmx"), tmp_path)


def test_a_model_that_onnx_runtime_refuses_names_the_engine(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("it will not do\nat all")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(RuntimeFailureError, match="cannot make 'ort-fp32': it will not do; leave it out by"):
        build(EngineSpec(peer="ort-fp32"), tmp_path)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_bench_engines, "_write_model", full)
    with pytest.raises(OutputError, match=r"weights of 'ort-fp32' cannot be written to '.*': No space left on device"):
        build(EngineSpec(peer="ort-fp32"), tmp_path)


@dataclass
class FakeEngine:
    """Takes what `durations` say on a clock of its own making; answers what it is given."""

    spec: EngineSpec
    clock: FakeClock
    durations: object
    copies: int = 2
    weight_bytes: int = 1000
    answers: list = field(default_factory=list)
    runs: int = 0

    def outputs(self, x):
        return self.answers

    def prepare(self, x):
        pass

    def run(self):
        self.clock.order.append(self.spec.name)
        self.clock.now += self.durations(self.runs)
        self.runs += 1

    def rest(self):
        self.clock.order.append("rest")

    def close(self):
        pass


@dataclass
class FakeClock:
    now: float = 0.0
    order: list = field(default_factory=list)

    def __call__(self):
        return self.now


def fakes(clock, **durations):
    return [
        FakeEngine(EngineSpec(peer=name.replace("_", "-")), clock, value if callable(value) else lambda _, v=value: v)
        for name, value in durations.items()
    ]


def reference_for(dense, x):
    return Reference.of([dense_float_weight(dense)], x)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answers: answers[1].__setitem__((0, 3), 9.0),
        lambda answers: answers[1].__setitem__((2, 5), np.nan),
        lambda answers: answers[1].__setitem__(slice(None), np.roll(answers[1], 1, axis=1)),
        lambda answers: answers.__setitem__(1, answers[1][:, :-1]),
    ],
)
def test_one_wrong_output_of_one_copy_ends_the_benchmark(spoil, generator):
    dense = generator.standard_normal((8, 20), dtype=np.float32)
    x = generator.standard_normal((3, 20), dtype=np.float32)
    [engine] = fakes(FakeClock(), ort_fp32=1.0)
    product = x @ dense.T
    engine.answers = [product.copy(), np.roll(product, 1, axis=1)]
    assert check_answers(engine, reference_for(dense, x), x) < 1e-5
    spoil(engine.answers)
    with pytest.raises(BenchmarkError, match=r"'ort-fp32' gives a wrong answer for 3 token.*copy 1 is off by"):
        check_answers(engine, reference_for(dense, x), x)


def test_fewer_tokens_are_held_against_the_same_products(generator):
    dense = generator.standard_normal((8, 20), dtype=np.float32)
    x = generator.standard_normal((3, 20), dtype=np.float32)
    [engine] = fakes(FakeClock(), ort_fp32=1.0)
    engine.answers = [x[:1] @ dense.T]
    assert check_answers(engine, reference_for(dense, x), x[:1]) < 1e-5


# ---- the timed loop -----------------------------------------------------------------------------------------------


def test_engines_take_turns_there_and_back_and_rest_after_each():
    clock = FakeClock()
    engines = fakes(clock, ort_fp32=0.1, torch_fp32=0.2, torch_bf16=0.3)
    timings = measure(engines, TimingPlan(0, 6), probe=lambda: (1.0,), clock=clock)
    assert len(timings.disturbed) == 6
    block = [name for name in clock.order if name != "rest"][6:12]
    assert block == ["ort-fp32", "torch-fp32", "torch-bf16", "torch-bf16", "torch-fp32", "ort-fp32"]
    assert clock.order.count("rest") == 3 + 6 * 6
    assert timings.elapsed_s == pytest.approx(6 * 2 * 0.6)
    # Two products in a run, and two turns of one run in a block.
    assert timings.seconds[1] == pytest.approx(np.full((6, 2), 0.1))


def test_a_short_run_is_repeated_and_warmed_up_in_its_turn():
    clock = FakeClock()
    [engine] = fakes(clock, ort_fp32=lambda run: 0.01)
    timings = measure([engine], TimingPlan(0, 6, turn_seconds=0.03), probe=lambda: (1.0,), clock=clock)
    assert np.shape(timings.seconds) == (1, 6, 6)
    assert engine.runs == 2 + 6 * 2 * (1 + 3)


def test_timing_goes_on_for_the_time_asked_for_but_not_beyond_the_most_blocks():
    clock = FakeClock()
    told = []
    measure(
        fakes(clock, ort_fp32=0.5),
        TimingPlan(10.0),
        probe=lambda: (1.0,),
        clock=clock,
        after_block=lambda *facts: told.append(facts),
    )
    assert [blocks for blocks, _ in told] == list(range(1, 11))
    assert told[-1][1] == pytest.approx(10.0)
    clock = FakeClock()
    timings = measure(fakes(clock, ort_fp32=0.5), TimingPlan(100.0, max_blocks=7), probe=lambda: (1.0,), clock=clock)
    assert len(timings.disturbed) == 7


def test_bandwidth_is_read_at_both_ends_of_each_block():
    clock = FakeClock()
    rates = iter(range(1, 100))
    timings = measure(
        fakes(clock, ort_fp32=0.5), TimingPlan(0, 6), bandwidth=lambda: next(rates), probe=lambda: (1.0,), clock=clock
    )
    assert timings.bandwidth == tuple(range(1, 13))


def test_too_few_blocks_for_an_interval_are_refused():
    with pytest.raises(BenchmarkError, match="3 to 60 blocks were asked for; an interval needs at least 6"):
        TimingPlan(1.0, min_blocks=3)


def test_a_block_is_disturbed_where_any_processor_spun_slowly():
    quiet = [(1.0, 2.0), (1.0, 2.0)]
    assert disturbed_blocks([quiet, quiet, [(1.0, 2.0), (1.0, 2.2)], quiet]) == (False, False, True, False)
    assert disturbed_blocks([quiet, [(1.04, 2.0), (1.0, 2.0)], quiet]) == (False, False, False)


def test_drift_is_a_tenth_between_the_halves():
    assert drifts([[1.0], [1.0], [1.2], [1.2]])
    assert drifts([[1.2], [1.2], [1.0], [1.0]])
    assert not drifts([[1.0, 1.09], [1.0], [1.05], [1.05]])


# ---- limits of the machine ----------------------------------------------------------------------------------------


def machine(**changes):
    facts = {"affinity_cpus": 8, "memory_available_bytes": 1 << 30, "caches": ()} | changes
    return SimpleNamespace(**facts)


def test_the_last_cache_counts_once_for_every_group_of_processors_that_shares_one():
    caches = (CacheLevel(1, "Data", 32 << 10, 1), CacheLevel(3, "Unified", 16 << 20, 3))
    assert last_cache_bytes(machine(caches=caches)) == 3 * (16 << 20)
    assert last_cache_bytes(machine(caches=caches, affinity_cpus=1)) == 16 << 20
    assert last_cache_bytes(machine(caches=(CacheLevel(9, "Instruction", 1, 1),))) == 32 << 20


def test_copies_are_limited_by_the_maps_that_linux_allows(tmp_path):
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "sys/vm/max_map_count").write_text("65530\n")
    assert max_copies(4, tmp_path) == 1024
    assert 3 * 40 * max_copies(40, tmp_path) < 65530
    assert max_copies(10**6, tmp_path) == 2
    assert max_copies(4, tmp_path / "none") == 1024


def test_more_memory_than_there_is_is_refused_before_it_is_taken():
    specs = peer_specs(["ort-fp32", "ort-int4-block32"], 4096)
    with pytest.raises(BenchmarkError, match=r"measuring 4096 x 4096 on 2 engines needs about .* GiB are free; choose"):
        check_memory(Shape(4096, 4096), specs, 256 << 20, machine())
    enough = check_memory(Shape(4096, 4096), specs, 256 << 20, machine(memory_available_bytes=1 << 34))
    assert 512 << 20 < enough < 1 << 30
    assert check_memory(Shape(4096, 4096), specs, 256 << 20, machine(memory_available_bytes=None)) == enough


def test_a_ring_may_be_cached_if_it_is_small_and_its_engine_fast():
    assert may_be_cached(10, 1 << 20, 100.0, 32 << 20)
    assert not may_be_cached(100, 1 << 20, 100.0, 32 << 20)
    assert not may_be_cached(2, 1 << 20, 200_000.0, 32 << 20)


# ---- figures and report -------------------------------------------------------------------------------------------


def small_case(*, shift=0.0):
    """Four engines whose times are 8, 4, 2 and 1 ms for two products, and ours ten times slower if `shift`."""
    clock = FakeClock()
    engines = fakes(clock, ort_fp32=0.08, ort_int4_block32=0.04, ort_int4_block128=0.02)
    engines[1].spec, engines[2].spec = peer_specs(["ort-int4-block32", "ort-int4-block128"], 256)
    ours = FakeEngine(EngineSpec(value=value_kind("int8"), row="avx2", sparsity=0.7), clock, lambda _: 0.01 + shift)
    engines.append(ours)
    plan = TimingPlan(0, 6, turn_seconds=0.01)
    timings = measure(engines, plan, bandwidth=lambda: 1e6, probe=lambda: (1.0,), clock=clock)
    return case_of(Shape(64, 256, ("a", "b")), 0.7, 2, engines, [0.0, 0.1, 0.2, 0.3], timings)


def test_ratios_are_to_float32_and_to_the_fastest_dense_int4():
    case = small_case()
    fp32, slow4, fast4, ours = case.timings
    assert case.strongest_int4 == "ort-int4-block128"
    assert (fp32.against_fp32, fast4.against_int4) == (None, None)
    assert slow4.against_int4.ratio == pytest.approx(0.5)
    assert ours.against_fp32.ratio == pytest.approx(8)
    assert ours.against_int4.ratio == pytest.approx(2)
    assert ours.median_us == pytest.approx(5000)
    assert ours.kernel_row == "avx2"
    assert ours.error == 0.3


def test_rates_follow_from_bytes_and_products():
    ours = small_case().timings[3]
    assert ours.gigabytes_per_s == pytest.approx(1000 / 0.005 / 1e9)
    assert ours.bandwidth_share == pytest.approx(0.2)
    assert ours.gigaops_per_s == pytest.approx(2 * 2 * 64 * 256 / 0.005 / 1e9)
    assert ours.bytes_per_weight == pytest.approx(1000 / (64 * 256))


def test_without_peers_or_bandwidth_there_is_no_ratio_and_no_share():
    clock = FakeClock()
    ours = FakeEngine(EngineSpec(value=value_kind("int8"), row="avx2"), clock, lambda _: 0.01)
    timings = Timings((((0.1,),) * 4,), (False,) * 4, (), 1.0)
    case = case_of(Shape(64, 256), 0.7, 1, [ours], [0.0], timings)
    assert case.strongest_int4 is None
    assert case.timings[0].against_fp32 is case.timings[0].against_int4 is case.timings[0].bandwidth_share is None
    assert kernel_rows(json.loads(json.dumps(_plain(case))))[0][-2:] == ("", "")


def _plain(case):
    from dataclasses import asdict

    return asdict(case)


@pytest.mark.parametrize(
    ("low", "ratio", "high", "words"),
    [
        (1.5, 2.0, 2.5, "2.00x (1.50–2.50)"),
        (0.5, 0.6, 0.7, "0.60x (0.50–0.70) no speed-up"),
        (0.9, 1.1, 1.3, "1.10x (0.90–1.30) no speed-up shown"),
        (0.8, 0.9, 1.1, "0.90x (0.80–1.10) no speed-up shown"),
    ],
)
def test_no_gain_is_said_in_words(low, ratio, high, words):
    assert ratio_text({"low": low, "ratio": ratio, "high": high}) == words


def test_a_case_is_titled_by_what_it_is():
    assert case_title(_plain(small_case())) == "64 x 256 (a, b), 2 tokens, 70% zeros"


def report_of(monkeypatch, config):
    monkeypatch.setattr(kernel_bench, "memory_bandwidth", lambda threads, ring: 1e10)
    monkeypatch.setattr(KernelBenchConfig, "ring_bytes", lambda self, cache: 1 << 15)
    return bench_kernels(config, show_progress=False)


@pytest.fixture
def tiny_config():
    return KernelBenchConfig(
        shapes=("64x128",),
        sparsities=(0.5, 0.75),
        tokens=(1, 5),
        values=native.VALUE_TYPES,
        peers=("ort-fp32", "ort-int8-dynamic", "ort-int4-block32", "ort-int4-block128"),
        threads=1,
        seconds=0.001,
        quick=True,
    )


def test_a_tiny_run_measures_every_case_and_writes_what_it_prints(kernels, monkeypatch, tmp_path, tiny_config):
    report = report_of(monkeypatch, tiny_config)
    assert [(case.sparsity, case.tokens) for case in report.cases] == [(0.5, 1), (0.5, 5), (0.75, 1), (0.75, 5)]
    row = native.describe().row
    ours = [f"losa-{value}@{row}" for value in native.VALUE_TYPES]
    for case in report.cases:
        assert [timing.name for timing in case.timings] == [*tiny_config.peers, *ours]
        assert all(timing.median_us > 0 and timing.blocks == case.blocks for timing in map(_with_blocks, case.timings))
        assert all(timing.error > 0 for timing in case.timings)
    path = tmp_path / "kernels.json"
    report.write(path)
    document = json.loads(path.read_text())
    assert document == report.as_dict()
    assert (document["schema"], document["schema_version"]) == ("losa-kernel-bench", 2)
    assert document["kernel"]["row"] == row
    assert document["config"]["rows"] == [row]
    assert str(tmp_path) not in path.read_text()
    screen = StringIO()
    print_kernel_bench(document, Console(file=screen, width=200))
    for text in ("64 x 128, 1 token, 50% zeros", "64 x 128, 5 tokens, 75% zeros", *ours, "interleaved blocks"):
        assert text in screen.getvalue()


def _with_blocks(timing):
    return SimpleNamespace(median_us=timing.median_us, blocks=len(timing.samples_us))


def test_named_rows_are_measured_side_by_side(kernels, monkeypatch):
    config = KernelBenchConfig(
        shapes=("32x64",), values=("fp32",), rows=("scalar",), peers=(), quick=True, seconds=0.001
    )
    report = report_of(monkeypatch, config)
    assert [timing.name for timing in report.cases[0].timings] == ["losa-fp32@scalar"]
    assert report.cases[0].strongest_int4 is None


def test_the_machine_record_has_what_the_benchmark_asks_of_it():
    record = machine_record()
    assert last_cache_bytes(record) > 0
    check_memory(Shape(16, 16), peer_specs(["ort-fp32"], 16), 1, record)


def test_a_kind_without_a_mask_keeps_every_byte():
    assert bytes_per_weight(ValueKind("int8", 16, dense=True), 0.9) == pytest.approx(1 + 2 / 128)
