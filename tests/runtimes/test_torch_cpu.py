from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import CheckpointError, InputError, MissingDependencyError, RuntimeFailureError
from losa_export.runtimes.base import Runtime
from losa_export.runtimes.generate import GenerationConfig, generate_text
from losa_export.runtimes.loader import load_runtime

pytest.importorskip("torch", reason="needs the extra 'train'")
pytest.importorskip("transformers", reason="needs the extra 'train'")

TOLERANCE = 2e-5  # float32, logits of order 5 after two blocks; batched products sum in another order
PROMPTS = [4, 9, 6]


@pytest.fixture(scope="module")
def runtime(tiny_checkpoint: Path) -> Runtime:
    return load_runtime("torch", tiny_checkpoint, threads=1)


@pytest.fixture(scope="module")
def sequences() -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 128, size=length + 5) for length in PROMPTS]


def alone(runtime: Runtime, sequence: NDArray[np.int64]) -> NDArray[np.float32]:
    return runtime.prefill(runtime.new_state(1, len(sequence)), 0, sequence)


def test_prefill_is_the_forward_pass_of_transformers(
    runtime: Runtime, tiny_checkpoint: Path, sequences: list[NDArray[np.int64]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(torch.from_numpy(sequences[1])[None]).logits[0].numpy()
    got = alone(runtime, sequences[1])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_decoding_rows_of_different_lengths_equals_each_row_alone(
    runtime: Runtime, sequences: list[NDArray[np.int64]]
) -> None:
    whole = [alone(runtime, sequence) for sequence in sequences]
    state = runtime.new_state(3, 20)
    for row in (2, 0, 1):
        runtime.prefill(state, row, sequences[row][: PROMPTS[row]])
    for step in range(5):
        at = [length + step for length in PROMPTS]
        got = runtime.decode(state, np.array([sequence[a] for sequence, a in zip(sequences, at, strict=True)]))
        np.testing.assert_allclose(got, [w[a] for w, a in zip(whole, at, strict=True)], atol=TOLERANCE)
    assert state.lengths.tolist() == [9, 14, 11]


def test_a_row_is_reused_after_reset_while_others_go_on(runtime: Runtime, sequences: list[NDArray[np.int64]]) -> None:
    first, second, third = sequences
    state = runtime.new_state(2, 20)
    runtime.prefill(state, 0, first[:4])
    runtime.prefill(state, 1, second[:12])
    runtime.decode(state, np.array([first[4], second[12]]))
    state.reset(1)
    runtime.prefill(state, 1, third[:7])
    got = runtime.decode(state, np.array([first[5], third[7]]))
    expected = [alone(runtime, first)[5], alone(runtime, third)[7]]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


@pytest.mark.parametrize("prefilled", [0, 3])
def test_a_row_may_be_decoded_from_nothing(
    runtime: Runtime, sequences: list[NDArray[np.int64]], prefilled: int
) -> None:
    sequence = sequences[0]
    state = runtime.new_state(2, 8)
    if prefilled:
        runtime.prefill(state, 1, sequence[:prefilled])
    got = runtime.decode(state, sequence[[0, prefilled]])
    np.testing.assert_allclose(got, alone(runtime, sequence)[[0, prefilled]], atol=TOLERANCE)


def test_a_model_that_knows_no_groups_of_heads_may_decode_from_nothing_too(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32)).save_pretrained(tmp_path)
    opened = load_runtime("torch", tmp_path, threads=1)
    sequence = np.arange(3, 9)
    state = opened.new_state(2, 8)
    opened.prefill(state, 1, sequence[:3])
    got = opened.decode(state, sequence[[0, 3]])
    np.testing.assert_allclose(got, alone(opened, sequence)[[0, 3]], atol=TOLERANCE)


def test_describe_tells_engine_and_files(runtime: Runtime, tiny_checkpoint: Path) -> None:
    import torch

    facts = runtime.describe()
    assert isinstance(runtime, Runtime)
    assert (facts.name, facts.engine, facts.version, facts.threads) == ("torch", "torch", torch.__version__, 1)
    assert facts.model_files == {"model.safetensors": (tiny_checkpoint / "model.safetensors").stat().st_size}


def test_loading_and_running_is_silent(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_runtime("torch", tiny_checkpoint, threads=1)
    loaded.decode(loaded.new_state(1, 4), np.array([1]))
    assert capfd.readouterr() == ("", "")


def test_the_state_of_another_runtime_is_refused(runtime: Runtime) -> None:
    class Foreign:
        lengths = np.zeros(1, np.int64)
        capacity = 4

        def reset(self, row: int) -> None: ...

    with pytest.raises(InputError, match=r"this state was made by another runtime; make it with new_state\(\)"):
        runtime.decode(Foreign(), np.array([1]))


def test_a_closed_runtime_says_so(tiny_checkpoint: Path) -> None:
    closed = load_runtime("torch", tiny_checkpoint, threads=1)
    closed.close()
    with pytest.raises(InputError, match="the runtime 'torch' is closed; load the folder again"):
        closed.new_state(1, 4)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json, so it is not a Hugging Face checkpoint; .*merged/"):
        load_runtime("torch", tmp_path, threads=1)


def test_an_export_is_refused_although_it_has_a_config(tmp_path: Path) -> None:
    for name in ("config.json", "model.onnx"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is an exported folder; the runtime 'torch' loads the merged/ folder"):
        load_runtime("torch", tmp_path, threads=1)


def test_truncated_weights_are_a_failure_that_names_the_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RuntimeFailureError, match=r"transformers cannot load '.*broken': .*; check the folder with"):
        load_runtime("torch", folder, threads=1)


def test_without_torch_the_message_names_the_extra(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        MissingDependencyError, match=r"the runtime 'torch' needs the package 'torch'.*losa-export\[train\]"
    ):
        load_runtime("torch", tiny_checkpoint, threads=1)


def test_text_is_generated_greedily_as_transformers_does(tiny_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prompt = tokenizer("the old cat", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    config = GenerationConfig(max_new_tokens=20)
    text = "".join(generate_text(tiny_checkpoint, "the old cat", config, runtime="torch", threads=1))
    assert text.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()


def test_the_other_runtimes_never_import_torch() -> None:
    code = (
        "import sys, losa_export.runtimes.loader, losa_export.runtimes.generate, losa_export.runtimes.ort; "
        "assert not {'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
