"""The evaluation over real exported files: stock ONNX Runtime always, our kernels where they are built."""

from __future__ import annotations

import json

import numpy as np
import pytest

from losa_export.errors import BenchmarkError, KernelError
from losa_export.eval.bench import BenchConfig, bench
from losa_export.eval.bench_report import read_bench
from losa_export.eval.perplexity import cut_windows, perplexity
from losa_export.eval.report import bench_markdown
from losa_export.runtimes.loader import load_runtime
from losa_export.text import load_tokenizer

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")


def _export(source, output, weights):
    from losa_export.export import ExportConfig, export_onnx

    # The gate has tests of its own, and would start torch in another process here.
    export_onnx(ExportConfig(source, output, weights=weights, gate=False, progress=False))
    return output


@pytest.fixture(scope="module")
def exports(tiny_checkpoint, tmp_path_factory):
    """A sparse and a dense export of one checkpoint with 70 % zeros, and a dense one of other weights."""
    from safetensors.numpy import load_file, save_file

    root = tmp_path_factory.mktemp("exports")
    pruned = root / "pruned"
    pruned.mkdir()
    for path in tiny_checkpoint.iterdir():
        (pruned / path.name).write_bytes(path.read_bytes())
    random = np.random.default_rng(0)
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            tensors[name] = np.where(random.random(tensor.shape) < 0.7, np.float32(0), tensor)
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    return {
        "sparse": _export(pruned, root / "sparse", "sparse"),
        "dense": _export(pruned, root / "dense", "dense"),
        "other": _export(tiny_checkpoint, root / "other", "dense"),
    }


@pytest.fixture(scope="module")
def kernels():
    from losa_export.runtimes.native import library_path

    try:
        return library_path()
    except KernelError as error:
        pytest.skip(f"the native library is not built: {error}")


def short(candidate, baseline, **options):
    fixed = {"prompt_tokens": 8, "new_tokens": 4, "min_blocks": 6, "max_blocks": 6, "min_seconds": 0.0, "threads": 1}
    fixed |= {"max_warmup_blocks": 2, "load_samples": 1, "timeout_s": 120.0}
    return BenchConfig(candidate, baseline, **(fixed | options))


def test_sparse_and_dense_exports_of_one_checkpoint_are_compared_in_processes_of_their_own(exports, tmp_path):
    config = short(exports["sparse"], exports["dense"], candidate_runtime="ort-stock")
    bench(config, show_progress=False).write(tmp_path / "bench.json")
    document = read_bench(tmp_path / "bench.json")
    assert document["answers"]["mode"] == "same"
    assert document["answers"]["decided_by"] == "weights digest"
    assert document["answers"]["candidate"]["gate"]["greedy"]["tokens"] == 96
    assert document["size_ratio"] < 1
    assert document["candidate"]["peak_rss_bytes"] > 10_000_000
    assert document["candidate"]["engine"]["engine"] == "onnxruntime"
    assert {file["name"] for file in document["candidate"]["files"]} >= {"model.onnx", "model.onnx.data", "export.json"}
    assert len(document["samples"]) == 24
    assert str(exports["sparse"].parent) not in json.dumps(document)
    assert "against dense (ort-stock), 1 thread" in bench_markdown(document)


def test_the_kernels_answer_as_the_dense_export_in_stock_onnx_runtime(exports, kernels):
    report = bench(short(exports["sparse"], exports["dense"]), show_progress=False)
    assert report.answers.candidate.against == "the baseline ('dense' in ort-stock)"
    assert report.candidate.engine["kernel_row"] is not None
    assert report.baseline.engine["kernel_row"] is None


def test_exports_of_other_weights_are_found_to_be_other_models(exports, kernels):
    report = bench(short(exports["sparse"], exports["other"]), show_progress=False)
    assert (report.answers.mode, report.answers.decided_by) == ("own", "weights digest")
    assert report.answers.candidate.against == "the same files in ort-stock"
    assert report.answers.baseline is not None


def test_exports_of_other_weights_that_ought_to_agree_end_the_benchmark(exports):
    config = short(exports["dense"], exports["other"], candidate_runtime="ort-stock", answers="same")
    with pytest.raises(BenchmarkError, match=r"nothing was timed, since the answers differ.*prefill of prompt 0"):
        bench(config, show_progress=False)


def test_perplexity_is_the_same_on_the_sparse_and_on_the_dense_file(exports, tiny_text):
    ids = load_tokenizer(exports["dense"]).encode(tiny_text.read_text(), add_special_tokens=False).ids
    windows = cut_windows(ids, 32, 3)
    found = []
    for name in ("sparse", "dense"):
        runtime = load_runtime("ort-stock", exports[name], threads=1)
        found.append(perplexity(runtime, windows, show_progress=False).mean_nll)
        runtime.close()
    # Two orders of summation in float32: relative errors of some 1e-6 in the logits.
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_perplexity_of_stories260k_is_the_published_reference_point(stories260k, shared_data, tmp_path):
    folder = _export(stories260k, tmp_path / "onnx", "dense")
    text = (shared_data / "text" / "tinystories" / "valid.txt").read_text(encoding="utf-8")
    windows = cut_windows(load_tokenizer(folder).encode(text, add_special_tokens=False).ids, 512, 40)
    report = perplexity(load_runtime("ort-stock", folder, threads=1), windows, show_progress=False)
    assert report.ppl == pytest.approx(4.66, abs=0.005)  # the reference is given to two decimals
    assert report.tokens == 40 * 511
