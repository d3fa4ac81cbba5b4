"""Merging: the arithmetic, the folders, and every way in which it must refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from losa_export import merge
from losa_export.checkpoint import Checkpoint, open_checkpoint
from losa_export.errors import AdapterError, CheckpointError, InputError, MaskError, MergeProofError, OutputError
from losa_export.files import sha256_of
from losa_export.masks import digest, load_masks, save_masks
from losa_export.merge import merge_adapter, merge_run, merge_weight, merged_config
from losa_export.peft_adapter import LowRank
from losa_export.reference import load_reference

needs_torch = pytest.mark.usefixtures("_torch")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def _torch() -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")


def prunable(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.names() if name.split(".")[-2] in LINEARS]


def random_masks(checkpoint: Checkpoint, sparsity: float = 0.5, seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.random(checkpoint.shape(name)) >= sparsity for name in prunable(checkpoint)}


def write_adapter(folder: Path, checkpoint: Checkpoint, *, rank: int = 4, **config: Any) -> None:
    generator = np.random.default_rng(2)
    tensors = {}
    for name in prunable(checkpoint):
        rows, columns = checkpoint.shape(name)
        module = "base_model.model." + name.removesuffix(".weight")
        tensors[module + ".lora_A.weight"] = generator.standard_normal((rank, columns)).astype(np.float32) / 8
        tensors[module + ".lora_B.weight"] = generator.standard_normal((rows, rank)).astype(np.float32) / 32
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(LINEARS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))


def write_run(folder: Path, base: Path, *, adapter: bool = True) -> Path:
    """A run folder as training leaves it: masks, and adapters of rank 4 with scaling 2."""
    checkpoint = open_checkpoint(base)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"[train]\nmodel = {json.dumps(str(base))}\nsparsity_fraction = 0.5\n")
    identity = {f"base_sha256:{path.name}": sha256_of(path) for path in checkpoint.weight_files()}
    save_masks(folder / "masks.safetensors", random_masks(checkpoint), identity)
    if adapter:
        write_adapter(folder / "adapter", checkpoint)
    return folder


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("merge") / "run", tiny_checkpoint)


@pytest.fixture(scope="module")
def merged(_torch: None, run: Path) -> Path:
    output = run.parent / "merged"
    merge_run(run, output)
    return output


# ---- arithmetic ---------------------------------------------------------------------------------------------------

EXAMPLE_W = np.array([[0.5, -1, 0.2, 0.8], [-0.3, 0.4, 2, -0.1]], np.float32)
EXAMPLE_A = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32)
EXAMPLE_B = np.array([[0.1, 0.2], [0.3, -0.1]], np.float32)
EXAMPLE_M = np.array([[0, 1, 0, 1], [0, 1, 1, 0]], bool)
# float32 inputs such as 0.1 are off by 3e-9 of themselves, and the result is rounded once more
EXAMPLE_TOLERANCE = 3e-7


def test_merge_gives_the_worked_example() -> None:
    merged = merge_weight(EXAMPLE_W, LowRank(EXAMPLE_A, EXAMPLE_B, 2.0), EXAMPLE_M)
    assert merged == pytest.approx(np.array([[0, -0.6, 0, 1.2], [0, 0.2, 2.6, 0]]), abs=EXAMPLE_TOLERANCE)
    assert merged @ np.arange(1.0, 5.0) == pytest.approx([3.6, 8.2], abs=10 * EXAMPLE_TOLERANCE)


def test_merge_of_the_first_rank_alone_gives_the_worked_example() -> None:
    merged = merge_weight(EXAMPLE_W, LowRank(EXAMPLE_A[:1], EXAMPLE_B[:, :1], 2.0), EXAMPLE_M)
    assert merged == pytest.approx(np.array([[0, -1, 0, 0.8], [0, 0.4, 2.6, 0]]), abs=EXAMPLE_TOLERANCE)


def test_an_unmasked_update_would_give_another_answer() -> None:
    x = np.arange(1.0, 5.0)
    dense = merge_weight(EXAMPLE_W, None, EXAMPLE_M) @ x + 2 * (EXAMPLE_B @ EXAMPLE_A) @ x
    assert dense == pytest.approx([4.4, 8.0], abs=10 * EXAMPLE_TOLERANCE)


def test_a_small_weight_under_a_large_update_is_not_lost() -> None:
    # In place and in bfloat16 this weight is gone after one merge and unmerge: 0.0001 + 0.05 rounds to 0.05005,
    # and 0.05005 - 0.05 to 0.
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the 'export' extra")
    narrow = ml_dtypes.bfloat16
    in_place = narrow(narrow(narrow(1e-4) + narrow(0.05)) - narrow(0.05))
    assert float(in_place) == 0.0

    weight = np.array([[1e-4]], np.float32)
    update = LowRank(np.array([[1.0]], np.float32), np.array([[0.05]], np.float32), 1.0)
    merged = merge_weight(weight, update, np.array([[True]]))
    assert merged[0, 0] == np.float32(np.float64(np.float32(1e-4)) + np.float64(np.float32(0.05)))
    assert weight[0, 0] == np.float32(1e-4)


@st.composite
def merges(draw: st.DrawFn) -> tuple[np.ndarray, LowRank, np.ndarray]:
    rows, columns, rank = (draw(st.integers(1, 12)) for _ in range(3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-4, 4))

    def matrix(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    keep = generator.random((rows, columns)) < draw(st.floats(0, 1))
    return matrix(rows, columns), LowRank(matrix(rank, columns), matrix(rows, rank) * np.float32(scale), 2.0), keep


@given(case=merges())
def test_merge_keeps_every_pruned_weight_at_exact_zero_and_loses_none(
    case: tuple[np.ndarray, LowRank, np.ndarray],
) -> None:
    weight, update, keep = case
    before = weight.copy()
    merged = merge_weight(weight, update, keep)
    assert merged.dtype == np.float32
    assert not merged[~keep].view(np.uint32).any()
    assert np.count_nonzero(merged[keep] == 0) <= 1e-6 * np.count_nonzero(keep)
    assert np.array_equal(weight, before)


@given(case=merges())
def test_merge_is_the_exact_sum_rounded_once(case: tuple[np.ndarray, LowRank, np.ndarray]) -> None:
    weight, update, keep = case
    exact = weight.astype(np.float64) + update.scaling * (update.b.astype(np.float64) @ update.a.astype(np.float64))
    merged = merge_weight(weight, update, keep)
    # half a unit in the last place of float32, and float64 rounding of terms that may cancel
    terms = np.abs(weight) + update.scaling * (np.abs(update.b).astype(np.float64) @ np.abs(update.a))
    limit = 2.0**-24 * np.abs(exact) + 2.0**-48 * terms + 2.0**-149
    assert (np.abs(merged - exact)[keep] <= limit[keep]).all()


def test_slices_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((37, 16)).astype(np.float32)
    update = LowRank(
        generator.standard_normal((3, 16)).astype(np.float32),
        generator.standard_normal((37, 3)).astype(np.float32),
        2.0,
    )
    whole = merge_weight(weight, update, None)
    monkeypatch.setattr(merge, "_SLICE_ELEMENTS", 64)
    sliced = merge_weight(weight, update, None)
    # BLAS may order sums of three terms differently for other heights: float64 rounding, then one to float32
    assert np.abs(sliced - whole).max() <= 2.0**-23 * np.abs(whole).max()


def test_pruned_infinities_become_zero() -> None:
    weight = np.array([[np.inf, -1.0]], np.float32)
    assert merge_weight(weight, None, np.array([[False, True]])).tolist() == [[0.0, -1.0]]


# ---- a run --------------------------------------------------------------------------------------------------------


@needs_torch
def test_merged_zeros_are_those_of_the_run_by_digest(run: Path, merged: Path) -> None:
    asked, got = load_masks(run / "masks.safetensors"), load_masks(merged / "masks.safetensors")
    record = json.loads((merged / "sparsity.json").read_text())
    written = open_checkpoint(merged)
    assert got.names == asked.names
    for name in asked.names:
        identity = digest(asked.read(name))
        assert digest(got.read(name)) == record["tensors"][name]["mask_sha256"] == identity
        assert digest(written.read(name) != 0) == identity  # random weights: no kept one is zero
        assert record["tensors"][name]["zeros"] == np.count_nonzero(~asked.read(name))


@needs_torch
def test_every_other_tensor_is_copied_bit_for_bit(tiny_checkpoint: Path, merged: Path) -> None:
    base, written = open_checkpoint(tiny_checkpoint), open_checkpoint(merged)
    others = set(base.names()) - set(prunable(base))
    assert others
    assert all(base.read(name).tobytes() == written.read(name).tobytes() for name in others)


@needs_torch
def test_merged_weights_are_base_and_update_under_the_mask(tiny_checkpoint: Path, run: Path, merged: Path) -> None:
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    masks = load_masks(run / "masks.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = (factors[f"base_model.model.{name[:-7]}.lora_{side}.weight"] for side in "AB")
    expected = (open_checkpoint(tiny_checkpoint).read(name) + 2.0 * b @ a) * masks.read(name)
    # float32 sums here, one rounding there
    assert np.abs(open_checkpoint(merged).read(name) - expected).max() < 1e-6


@needs_torch
def test_merged_folder_carries_all_that_a_user_needs(tiny_checkpoint: Path, merged: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == "float32"
    reference = load_reference(merged / "reference.safetensors")
    assert reference is not None
    assert reference.model_id == open_checkpoint(merged).weights_sha256()


@needs_torch
def test_sparsity_record_tells_totals_proof_and_provenance(tiny_checkpoint: Path, run: Path, merged: Path) -> None:
    record = json.loads((merged / "sparsity.json").read_text())
    assert record["format"] == "losa-sparsity-1"
    zeros = [tensor["zeros"] for tensor in record["tensors"].values()]
    assert record["totals"]["zeros"] == sum(zeros)
    assert record["totals"]["weights"] == len(zeros) == 14
    assert record["proof"]["kept_weights_lost"] == 0
    logits = record["proof"]["logits_merged_against_unmerged"]
    assert logits["max_relative_error"] < 1e-5
    assert logits["argmax_agreement"] == 1.0
    provenance = record["provenance"]
    assert provenance["base"]["weights_sha256"] == {
        "model.safetensors": sha256_of(tiny_checkpoint / "model.safetensors")
    }
    assert provenance["run"] == {"name": "run", "config": {"model": "checkpoint", "sparsity_fraction": 0.5}}
    assert provenance["mask_source"] == "masks.safetensors"
    assert set(provenance["adapter"]["ranks"].values()) == {4}
    assert provenance["adapter"]["scalings"] == [2.0]
    assert "torch" in provenance["versions"]


@needs_torch
def test_the_report_reads_as_a_summary(run: Path, tmp_path: Path) -> None:
    report = merge_run(run, tmp_path / "merged")
    assert str(report).startswith(f"merged into {tmp_path / 'merged'} in ")
    assert "of 14 weights, 14 with an adapter" in str(report)
    assert "every one exactly zero" in str(report)
    assert report.sparsity_fraction == pytest.approx(0.5, abs=0.02)  # random masks of some 60,000 positions


# PEFT 0.21 asks a model for a property that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@needs_torch
def test_merged_logits_equal_those_of_peft_under_the_mask(tiny_checkpoint: Path, run: Path, merged: Path) -> None:
    # another implementation of the adapter, which knows no masks: mask what PEFT merged, then compare
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="needs the 'dev' extra")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()
    masks = load_masks(run / "masks.safetensors")
    tokens = torch.arange(24)[None] % 128
    with torch.no_grad():
        for name in masks.names:
            model.get_parameter(name).mul_(torch.from_numpy(masks.read(name)))
        plain = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        ours, theirs = plain(tokens).logits.numpy(), model(tokens).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()  # float32


@needs_torch
def test_a_round_trip_through_transformers_keeps_zeros_and_loss(merged: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    masks, written = load_masks(merged / "masks.safetensors"), open_checkpoint(tmp_path / "again")
    for name in masks.names:
        assert digest(written.read(name) != 0) == digest(masks.read(name))
    tokens = torch.arange(64)[None] % 128
    with torch.no_grad():
        first, second = (float(one(tokens, labels=tokens).loss) for one in (model, again))
    assert second == pytest.approx(first, rel=1e-4)


@needs_torch
def test_a_run_that_only_pruned_merges_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_checkpoint, adapter=False)
    report = merge_run(run, tmp_path / "merged")
    base, written = open_checkpoint(tiny_checkpoint), open_checkpoint(tmp_path / "merged")
    masks = load_masks(run / "masks.safetensors")
    assert report.adapted == 0
    for name in masks.names:
        assert np.array_equal(written.read(name), np.where(masks.read(name), base.read(name), np.float32(0)))
    assert json.loads((tmp_path / "merged" / "sparsity.json").read_text())["provenance"]["adapter"] is None


@needs_torch
def test_a_base_that_has_moved_can_be_named(tiny_checkpoint: Path, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    merge_run(run, tmp_path / "merged", base=moved)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@needs_torch
def test_kept_weights_that_are_zero_in_the_base_are_counted_but_not_lost(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0] = 0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = write_run(tmp_path / "run", base, adapter=False)
    report = merge_run(run, tmp_path / "merged")
    kept = int(np.count_nonzero(load_masks(run / "masks.safetensors").read(name)[0]))
    assert report.tensors[name].kept_zeros == kept > 0
    assert report.lost == 0


# ---- refusals of a run ----------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    with pytest.raises(InputError, match=r"has no config\.toml, so it is no run folder; give one made by 'losa train'"):
        merge_run(tmp_path / "run", tmp_path / "merged")


def test_a_broken_run_config_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text("[train")
    with pytest.raises(InputError, match=r"config\.toml' cannot be read as TOML .*run 'losa train' again"):
        merge_run(tmp_path / "run", tmp_path / "merged")


@pytest.mark.parametrize("text", ["", "[train]\nmodel = 3\n", "train = 3\n"])
def test_a_run_config_without_a_model_asks_for_the_base(run: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text(text)
    with pytest.raises(InputError, match=r"names no model under \[train\]; give the dense checkpoint with --base"):
        merge_run(tmp_path / "run", tmp_path / "merged")


def test_a_base_that_is_gone_asks_for_the_new_place(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text('[train]\nmodel = "/gone/away"\n')
    with pytest.raises(CheckpointError, match=r"dense checkpoint '/gone/away' .* is gone; give it with --base"):
        merge_run(tmp_path / "run", tmp_path / "merged")


def test_an_unfinished_run_has_no_masks(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "masks.safetensors").unlink()
    with pytest.raises(MaskError, match="does not exist"):
        merge_run(tmp_path / "run", tmp_path / "merged")


def with_masks(run: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None], **metadata: str) -> Path:
    shutil.copytree(run, folder)
    masks = load_masks(run / "masks.safetensors").read_all()
    change(masks)
    save_masks(folder / "masks.safetensors", masks, metadata)
    return folder


def test_masks_of_other_names_are_refused_with_the_mend(run: Path, tmp_path: Path) -> None:
    changed = with_masks(
        run, tmp_path / "run", lambda masks: masks.update({"model.layers.9.x.weight": np.ones((2, 2), bool)})
    )
    with pytest.raises(
        MaskError, match=r"another checkpoint: .* has no tensor 'model\.layers\.9\.x\.weight'; give .*--base"
    ):
        merge_run(changed, tmp_path / "merged")


def test_masks_of_another_shape_are_refused_with_both_shapes(run: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    changed = with_masks(run, tmp_path / "run", lambda masks: masks.update({name: np.ones((64, 8), bool)}))
    with pytest.raises(
        MaskError, match=r"mask for '.*down_proj\.weight' is \(64, 8\), its weight is \(64, 176\); masks"
    ):
        merge_run(changed, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_masks_recorded_for_other_weights_are_refused(run: Path, tmp_path: Path) -> None:
    changed = with_masks(run, tmp_path / "run", lambda masks: None, **{"base_sha256:model.safetensors": "0" * 64})
    with pytest.raises(
        MaskError, match=r"made for other weights than those of .* \(the sha256 differs\); give .*--base"
    ):
        merge_run(changed, tmp_path / "merged")


def test_output_may_not_be_the_base_or_the_run(tiny_checkpoint: Path, run: Path) -> None:
    with pytest.raises(OutputError, match="is the input itself"):
        merge_run(run, tiny_checkpoint, overwrite=True)
    with pytest.raises(OutputError, match="is the input itself"):
        merge_run(run, run, overwrite=True)


def test_output_that_is_not_empty_needs_overwrite(run: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "keep").touch()
    with pytest.raises(OutputError, match="is not empty; add --overwrite"):
        merge_run(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "keep").exists()


def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OutputError, match=r"could not be written .*No space left on device.* free some space"):
        merge_run(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_merge_that_wakes_a_zero_fails_its_proof_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(weight: np.ndarray, update: LowRank | None, keep: np.ndarray | None) -> np.ndarray:
        return merge_weight(weight, update, None)

    monkeypatch.setattr(merge, "merge_weight", careless)
    with pytest.raises(MergeProofError, match=r"pruned positions of '.*' are not exactly zero after the merge"):
        merge_run(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_merge_with_another_scaling_fails_its_proof_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(weight: np.ndarray, update: LowRank | None, keep: np.ndarray | None) -> np.ndarray:
        more = None if update is None else LowRank(update.a, update.b, 2 * update.scaling)
        return merge_weight(weight, more, keep)

    monkeypatch.setattr(merge, "merge_weight", doubled)
    with pytest.raises(MergeProofError, match=r"the merged model answers differently: relative error of its logits"):
        merge_run(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


# ---- an adapter trained elsewhere -----------------------------------------------------------------------------------


@needs_torch
def test_an_adapter_merges_into_a_sparse_base_under_its_masks(merged: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", open_checkpoint(merged))
    report = merge_adapter(merged, tmp_path / "adapter", tmp_path / "out")
    before, after = load_masks(merged / "masks.safetensors"), load_masks(tmp_path / "out" / "masks.safetensors")
    assert report.adapted == 14
    for name in before.names:
        assert digest(after.read(name)) == digest(before.read(name))
        assert not open_checkpoint(tmp_path / "out").read(name)[~before.read(name)].any()
    # and the result is a base in its turn
    merge_adapter(tmp_path / "out", tmp_path / "adapter", tmp_path / "twice")


@needs_torch
def test_without_masks_the_zeros_of_the_base_are_the_mask_and_that_is_recorded(merged: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(merged, base)
    (base / "masks.safetensors").unlink()
    write_adapter(tmp_path / "adapter", open_checkpoint(base))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert record["provenance"]["mask_source"] == "weights of the base that are not zero"
    before, after = load_masks(merged / "masks.safetensors"), load_masks(tmp_path / "out" / "masks.safetensors")
    assert all(digest(after.read(name)) == digest(before.read(name)) for name in before.names)


@needs_torch
def test_an_adapter_on_a_weight_without_mask_is_folded_in_whole(merged: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(merged, base)
    masks = load_masks(merged / "masks.safetensors").read_all()
    name = "model.layers.0.self_attn.o_proj.weight"
    del masks[name]
    save_masks(base / "masks.safetensors", masks, {})
    write_adapter(tmp_path / "adapter", open_checkpoint(base))
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert name not in report.tensors
    assert np.all(open_checkpoint(tmp_path / "out").read(name) != 0)


def test_a_base_that_is_awake_under_its_masks_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    save_masks(base / "masks.safetensors", random_masks(open_checkpoint(base)), {})
    write_adapter(tmp_path / "adapter", open_checkpoint(base))
    with pytest.raises(MaskError, match=r"has \d+ weights that are not zero where its masks prune; masks\.safetensors"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", open_checkpoint(tiny_checkpoint))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors[key] = np.ascontiguousarray(tensors[key][:, :-1])
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"factors A \(4, 63\) and B \(176, 4\) of rank 4 for '.*up_proj\.weight'"):
        merge_adapter(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out")


# ---- config.json ----------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rotary_scaling_is_written_in_both_spellings(config: dict[str, Any]) -> None:
    merged = merged_config(config)
    assert merged["rope_parameters"] == {"rope_theta": 5e5, **LLAMA3}
    assert (merged["rope_theta"], merged["rope_scaling"]) == (5e5, LLAMA3)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_plain_rotary_embedding_is_written_in_both_spellings(config: dict[str, Any]) -> None:
    merged = merged_config(config)
    assert merged["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    assert (merged["rope_theta"], merged.get("rope_scaling")) == (5e5, None)


def test_an_old_name_of_the_scaling_kind_is_brought_up_to_date() -> None:
    merged = merged_config({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert merged["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def test_the_merged_config_is_float32_and_leaves_its_input_alone() -> None:
    config = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "rope_theta": 1e4}
    merged = merged_config(config)
    assert merged["dtype"] == "float32"
    assert "torch_dtype" not in merged
    assert config == {"torch_dtype": "bfloat16", "dtype": "bfloat16", "rope_theta": 1e4}


@needs_torch
@settings(deadline=None)
@given(spelling=st.sampled_from(["old", "new"]))
def test_transformers_turns_the_same_angles_from_either_spelling(spelling: str, tiny_checkpoint: Path) -> None:
    import transformers

    raw = json.loads((tiny_checkpoint / "config.json").read_text())
    raw.pop("rope_parameters")
    raw.pop("rope_theta")
    given_config = (
        raw | {"rope_theta": 5e4, "rope_scaling": LLAMA3}
        if spelling == "old"
        else raw | {"rope_parameters": {"rope_theta": 5e4, **LLAMA3}}
    )
    expected, merged = (
        transformers.LlamaModel(transformers.LlamaConfig(**config)).rotary_emb.inv_freq
        for config in (given_config, merged_config(given_config))
    )
    assert bool((expected == merged).all())
