"""`losa doctor`: crossings and limits as pure functions, advice, and small real runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from losa_export.errors import BenchmarkError, ConfigError, KernelError, MissingDependencyError
from losa_export.eval import doctor
from losa_export.eval.doctor import DoctorConfig, run_doctor
from losa_export.eval.doctor_report import Product, advise, payoff_rows, payoff_text, print_doctor, time_rows
from losa_export.eval.kernel_bench import DEFAULT_VALUES
from losa_export.eval.kernel_bench_roofline import (
    Crossing,
    Pays,
    break_even_by_bytes,
    crossing,
    last_crossing,
    roofline_us,
)
from losa_export.eval.kernel_bench_weights import bytes_per_weight, value_kind
from losa_export.eval.stats import RatioEstimate, verdict
from losa_export.runtimes import native

SPARSITIES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)


def estimate(ratio, low=None, high=None):
    low, high = ratio if low is None else low, ratio if high is None else high
    return RatioEstimate(ratio, low, high, 0.95, 4, verdict(low, high), max(ratio / low, high / ratio))


ratios = st.floats(0.05, 20)
estimates = st.tuples(ratios, ratios, ratios).map(sorted).map(lambda ends: estimate(ends[1], ends[0], ends[2]))
curves = st.lists(estimates, min_size=len(SPARSITIES), max_size=len(SPARSITIES))


# ---- crossings ----------------------------------------------------------------------------------------------------


def test_a_straight_line_in_the_logarithm_crosses_where_it_should():
    # 0.5 at no zeros, doubling every half: 1 at 50 %.
    assert last_crossing((0.0, 0.25, 0.9), [0.5 * 4**s for s in (0.0, 0.25, 0.9)]) == pytest.approx(0.5)


@given(st.floats(0.01, 0.89), st.floats(0.5, 8))
def test_a_crossing_of_a_straight_curve_is_found_exactly(where, steepness):
    values = [2.0 ** (steepness * (sparsity - where)) for sparsity in SPARSITIES]
    assert last_crossing(SPARSITIES, values) == pytest.approx(where, abs=1e-6)


@given(st.lists(ratios, min_size=len(SPARSITIES), max_size=len(SPARSITIES)))
def test_from_the_crossing_on_every_measured_ratio_pays_and_before_it_one_does_not(values):
    found = last_crossing(SPARSITIES, values)
    if found is None:
        assert values[-1] < 1
        return
    assert all(value >= 1 for sparsity, value in zip(SPARSITIES, values, strict=True) if sparsity > found)
    below = [sparsity for sparsity, value in zip(SPARSITIES, values, strict=True) if value < 1]
    if below:
        following = SPARSITIES[SPARSITIES.index(below[-1]) + 1]
        assert below[-1] <= found <= following
    else:
        assert found == SPARSITIES[0]


@given(st.lists(ratios, min_size=len(SPARSITIES), max_size=len(SPARSITIES)), st.floats(1, 3))
def test_a_faster_kernel_never_crosses_later(values, factor):
    before, after = last_crossing(SPARSITIES, values), last_crossing(SPARSITIES, [factor * one for one in values])
    if before is not None:
        assert after is not None
        assert after <= before + 1e-9


@given(curves)
def test_the_ends_of_the_interval_lie_around_the_estimate(curve):
    found = crossing(SPARSITIES, curve)
    ends = [1.0 if end is None else end for end in (found.earliest, found.sparsity, found.latest)]
    assert ends[0] <= ends[1] + 1e-9
    assert ends[1] <= ends[2] + 1e-9


@given(curves)
def test_what_is_said_follows_from_the_intervals(curve):
    match crossing(SPARSITIES, curve).pays:
        case Pays.EVERYWHERE:
            assert all(one.low > 1 for one in curve)
        case Pays.FROM:
            assert curve[-1].low >= 1
        case Pays.UNDECIDED:
            assert curve[-1].low < 1 <= curve[-1].high
        case Pays.NOWHERE:
            assert curve[-1].high < 1


def test_an_interval_that_reaches_below_one_at_the_end_leaves_it_undecided():
    found = crossing((0.5, 0.9), [estimate(0.5), estimate(1.5, 0.9, 2.0)])
    assert found.pays is Pays.UNDECIDED
    assert found.latest is None
    assert 0.5 < found.earliest < found.sparsity < 0.9


def test_sparsities_that_do_not_fit_are_refused():
    with pytest.raises(BenchmarkError, match="1 ratios were given for 2 sparsities"):
        crossing((0.5, 0.9), [estimate(1.0)])
    with pytest.raises(BenchmarkError, match=r"the sparsities \[0.9, 0.5\] do not ascend"):
        crossing((0.9, 0.5), [estimate(1.0), estimate(1.0)])
    with pytest.raises(BenchmarkError, match="0 ratios were given for 0 sparsities"):
        crossing((), [])


# ---- limits by bytes ----------------------------------------------------------------------------------------------


@given(st.sampled_from(native.VALUE_TYPES), st.floats(0.05, 8), st.sampled_from([64, 128]))
def test_at_the_limit_both_read_the_same_bytes(name, peer_bytes, group):
    kind = value_kind(name)
    limit = break_even_by_bytes(kind, peer_bytes, group=group)
    if limit is None:
        assert bytes_per_weight(kind, 1.0, group=group) > peer_bytes
    elif limit == 0:
        assert bytes_per_weight(kind, 0.0, group=group) <= peer_bytes
    else:
        # int4 codes begin at whole bytes of a step, which the ends 0 and 1 need not.
        assert bytes_per_weight(kind, limit, group=group) == pytest.approx(peer_bytes, abs=0.0041)


def test_limits_of_the_common_cases():
    # int8 non-zeros: 1/8 + (1 - s) + 2/128 bytes; dense int4 in blocks of 128: 1/2 + 4/128.
    assert break_even_by_bytes(value_kind("int8"), 0.5 + 4 / 128) == pytest.approx(1 / 8 + 1 + 2 / 128 - 0.53125)
    assert break_even_by_bytes(value_kind("fp32"), 4.0) == pytest.approx(1 / 32)
    assert break_even_by_bytes(value_kind("int8"), 4.0) == 0
    assert break_even_by_bytes(value_kind("fp32"), 0.1) is None
    assert break_even_by_bytes(value_kind("dense-int8"), 0.6) is None


def test_reading_a_gigabyte_at_ten_a_second_takes_a_tenth():
    assert roofline_us(10**9, 1e10) == pytest.approx(1e5)


# ---- advice and text ----------------------------------------------------------------------------------------------


def product(value, sparsity, median_us, ratio, low=None, high=None):
    against = {rival: estimate(ratio, low, high) for rival in ("dense fp32", "dense int8", "dense int4")}
    return Product(f"losa-{value}@avx2", value, sparsity, 9, 1000, median_us, 10.0, against, ((median_us,),))


def test_the_most_exact_kind_within_a_twentieth_of_the_fastest_is_advised():
    found = advise(
        [product("int8", 0.7, 104.0, 1.3), product("int4", 0.7, 100.0, 1.35), product("fp32", 0.7, 300.0, 0.5)]
    )
    assert found == ["at 70% zeros store int8: 1.30x the speed of dense int4"]
    found = advise([product("int8-a8", 0.7, 100.0, 1.3)])
    assert found == ["at 70% zeros store int8 (8-bit activations): 1.30x the speed of dense int4"]
    found = advise([product("int8", 0.7, 106.0, 1.3), product("int4", 0.7, 100.0, 1.35)])
    assert found == ["at 70% zeros store int4: 1.35x the speed of dense int4"]


def test_neighbours_with_the_same_advice_share_a_sentence():
    products = [product("int8", sparsity, 100.0, 1 + sparsity) for sparsity in (0.6, 0.7, 0.8)]
    assert advise(products) == ["at 60% to 80% zeros store int8: 1.60x to 1.80x the speed of dense int4"]


def test_what_does_not_surely_beat_dense_int4_is_called_no_speed_up():
    found = advise([product("int4", 0.5, 100.0, 1.1, 0.9, 1.3), product("int4", 0.9, 50.0, 2.0)])
    assert found == [
        "at 50% zeros no speed-up over dense int4 is shown: int4, the best, runs at 1.10x its speed",
        "at 90% zeros store int4: 2.00x the speed of dense int4",
    ]


def test_no_advice_is_given_for_a_model_without_zeros_or_without_measurements():
    assert advise([]) == []
    assert advise([product("int4", 0.0, 100.0, 1.1)]) == []


@pytest.mark.parametrize(
    ("measured", "by_bytes", "text"),
    [
        (Crossing(Pays.EVERYWHERE, 0.0, 0.0, 0.0), 0.0, "at any sparsity; bytes: any"),
        (Crossing(Pays.FROM, 0.52, 0.48, 0.57), 0.45, "from 52% (48%–57%); bytes: 45%"),
        (Crossing(Pays.UNDECIDED, None, 0.8, None), 0.61, "undecided, not before 80%; bytes: 61%"),
        (Crossing(Pays.NOWHERE, None, None, None), None, "no speed-up; bytes: never"),
    ],
)
def test_a_crossing_is_put_into_words(measured, by_bytes, text):
    assert payoff_text({"measured": vars(measured), "by_bytes": by_bytes}) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "tinyllama"}, "shape is 'tinyllama'; give one size"),
        ({"shape": "big"}, "'big' is neither a model"),
        ({"sparsities": (0.5,)}, "at least two different sparsities"),
        ({"sparsities": (0.5, 0.5)}, "at least two different sparsities"),
        ({"sparsities": (0.5, 1.5)}, "sparsities holds 1.5"),
        ({"values": ()}, "each value once"),
        ({"values": ("int8", "int8")}, "each value once"),
        ({"values": ("int2",)}, "'int2' is not a kind of value"),
        ({"seconds": -1.0}, "seconds is -1.0"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        DoctorConfig(**options)


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_memory(monkeypatch):
    """A bandwidth and a cache of a small machine, so that a run needs neither much memory nor much time."""
    try:
        native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")
    rates = []

    def bandwidth(threads, ring_bytes):
        rates.append(threads)
        return 1e10 * threads

    monkeypatch.setattr(doctor, "memory_bandwidth", bandwidth)
    monkeypatch.setattr(doctor, "last_cache_bytes", lambda machine: 1 << 14)
    return rates


def printed(report):
    screen = StringIO()
    print_doctor(report.as_dict(), Console(file=screen, width=200))
    return screen.getvalue()


def test_a_small_run_measures_each_kind_of_value_against_each_rival(quiet_memory, tmp_path):
    config = DoctorConfig(shape="64x128", sparsities=(0.9, 0.5, 0.7), threads=2, seconds=60.0)
    # The time left after building would be spent on blocks; four are enough here.
    report = run_short(config)
    assert report.missing is None
    assert (report.bandwidth_one, report.bandwidth_all) == (1e10, 2e10)
    assert quiet_memory[:2] == [1, 2]
    ours = [one for one in report.products if one.value]
    assert {(one.value, one.sparsity) for one in ours} == {(v, s) for v in DEFAULT_VALUES for s in (0.5, 0.7, 0.9)}
    assert len(report.products) == len(ours) + 4
    assert all(set(one.against) == {"dense fp32", "dense int8", "dense int4"} for one in ours)
    assert {(one.value, one.rival) for one in report.payoffs} == {
        (value, rival) for value in DEFAULT_VALUES for rival in ("dense fp32", "dense int8", "dense int4")
    }
    assert report.advice
    path = tmp_path / "doctor.json"
    report.write(path)
    document = json.loads(path.read_text())
    assert document == report.as_dict()
    assert (document["schema"], document["schema_version"], document["missing"]) == ("losa-doctor", 2, None)
    assert [row[0] for row in payoff_rows(document)] == list(DEFAULT_VALUES)
    assert [len(row) for row in time_rows(document)] == [4] * (len(DEFAULT_VALUES) + 4)
    text = printed(report)
    for part in ("Processor: ", f"Kernels: {native.describe().row}", "10.0 GB/s with 1 thread, 20.0 GB/s with 2"):
        assert part in text
    for part in ("against dense int4", "90% zeros", "ort-int4-block128", "Advice: at "):
        assert part in text


def run_short(config):
    """`run_doctor` that stops timing after the six blocks that an interval needs."""
    real = doctor.TimingPlan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "TimingPlan", lambda seconds, **options: real(0.0, **options))
        return run_doctor(config, show_progress=False)


def test_a_ring_is_thrice_the_last_cache_unless_memory_is_short(quiet_memory):
    config = DoctorConfig(sparsities=(0.5, 0.9), values=("int8",))

    def ring(available):
        return doctor.ring_for(config, SimpleNamespace(memory_available_bytes=available))

    assert ring(1 << 34) == ring(None) == 3 << 14
    # Six engines share two fifths of what is free.
    assert ring(60_000) == 4000
    assert ring(0) == 1


def test_limits_are_bytes_over_the_bandwidth_of_the_run(quiet_memory):
    report = run_short(DoctorConfig(shape="64x128", sparsities=(0.5, 0.9), values=("fp32",), threads=1, seconds=60.0))
    assert all(one.limit_us == pytest.approx(1e6 * one.weight_bytes / 1e10) for one in report.products)


def test_sparsities_that_time_did_not_suffice_for_are_named(quiet_memory):
    config = DoctorConfig(shape="64x128", sparsities=SPARSITIES, values=("fp32",), threads=1, seconds=0.001)
    report = run_short(config)
    assert {one.sparsity for one in report.products if one.value} == {0.5, 0.9}
    [warning] = [one for one in report.warnings if "time did not suffice" in one]
    assert warning == "time did not suffice for 0%, 60%, 70%, 80% zeros; raise --seconds to see them"


def test_without_onnx_rows_and_bandwidth_are_still_shown(quiet_memory, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else real(name))
    report = run_doctor(DoctorConfig(threads=1), show_progress=False)
    assert isinstance(report.missing, MissingDependencyError)
    assert "losa-export[export]" in str(report.missing)
    assert report.products == report.payoffs == report.advice == ()
    assert report.as_dict()["missing"] == str(report.missing)
    text = printed(report)
    assert "Memory: 10.0 GB/s with 1 thread" in text
    assert "against" not in text


def test_a_disturbed_machine_is_said_so():
    timings = SimpleNamespace(disturbed=(True, True, False, False))
    quiet = SimpleNamespace(disturbed=(True, False, False, False))
    config = DoctorConfig(sparsities=(0.5, 0.9))
    products = [replace(product("int8", sparsity, 100.0, 1.5), copies=10**6) for sparsity in (0.5, 0.9)]
    [warning] = doctor._warnings(config, products, timings, 1 << 20)
    assert "2 of 4 blocks were disturbed" in warning
    assert doctor._warnings(config, products, quiet, 1 << 20) == []


def test_a_ring_that_the_cache_may_hold_is_said_so():
    quiet = SimpleNamespace(disturbed=(False,) * 4)
    products = [product("int8", sparsity, 100.0, 1.5) for sparsity in (0.5, 0.9)]
    [warning] = doctor._warnings(DoctorConfig(sparsities=(0.5, 0.9)), products, quiet, 1 << 20)
    assert warning.startswith("the copies of losa-int8@avx2 take less than twice the last cache")


def test_the_doctor_needs_none_of_the_packages_of_the_export_extra_to_start():
    blocked = "for name in ('onnx', 'onnx_ir', 'ml_dtypes', 'safetensors', 'torch'): sys.modules[name] = None"
    program = f"import sys\n{blocked}\nimport losa_export.eval.doctor\nprint('started')"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("started\n", "")
