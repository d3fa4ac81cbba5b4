from __future__ import annotations

from pathlib import Path

import pytest
import torch

from losa_export.training import products
from losa_export.training.products import fast_products, product_library


@pytest.mark.parametrize("shape", [(1, 7, 5), (64, 48, 40), (300, 576, 8), (8, 576, 300), (512, 384, 640)])
def test_products_are_those_of_float32_whichever_library_makes_them(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    exact = left.double() @ right.double().T
    with fast_products(product_library()):
        for product in (left @ right.T, torch.nn.functional.linear(left, right), (right @ left.T).T):
            # 2e-6 in norm: float32 sums of up to 576 terms; rounding to bfloat16 would be 2e-3 off
            assert float((product.double() - exact).norm()) < 2e-6 * float(exact.norm())


def test_the_setting_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ValueError, match="on purpose"), fast_products("onednn"):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise ValueError("on purpose")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with fast_products("default"):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("maker", "amx", "wide", "library"),
    [
        ("AuthenticAMD", False, True, "onednn"),
        ("AuthenticAMD", True, True, "default"),
        ("AuthenticAMD", False, False, "default"),
        ("GenuineIntel", False, True, "default"),
        ("", False, True, "default"),
    ],
)
def test_onednn_is_taken_where_it_keeps_float32_and_mkl_is_slow(
    monkeypatch: pytest.MonkeyPatch, maker: str, amx: bool, wide: bool, library: str
) -> None:
    monkeypatch.setattr(products, "_maker", lambda: maker)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: wide)
    assert product_library.__wrapped__() == library


def test_the_maker_is_read_from_linux_and_unknown_elsewhere(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: EPYC\n")
    assert products._maker(cpuinfo) == "AuthenticAMD"
    assert products._maker(tmp_path / "none") == ""
