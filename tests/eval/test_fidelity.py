from __future__ import annotations

import math

import numpy as np
import pytest

from losa_export.eval import fidelity as module
from losa_export.eval.fidelity import fidelity, kl_divergence, log_softmax


def test_kl_divergence_of_known_distributions():
    exact = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    rounded = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    wanted = (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert kl_divergence(exact, rounded) == pytest.approx(wanted, rel=1e-5)
    logits = np.array([[1000.0, 1001.0]], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(axis=1), 1, rtol=1e-6)


def test_loss_divergence_and_agreement_are_means_over_scored_tokens(fake_runtime, monkeypatch):
    # Two rows at once: windows are then compared in several pieces, the last of them a short one.
    monkeypatch.setattr(module, "_CHUNK_ROWS", 2)
    exact, other = fake_runtime(0), fake_runtime(1)
    windows = np.random.default_rng(0).integers(0, exact.vocab_size, (3, 6))
    same, found = fidelity([exact, other], windows, show_progress=False)
    assert same.kl_divergence.tolist() == [0.0] * 3
    assert same.agreement.tolist() == [1.0] * 3
    for place, ids in enumerate(windows):
        ours, theirs = (
            log_softmax(runtime.prefill(runtime.new_state(1, 6), 0, ids))[:-1].astype(np.float64)
            for runtime in (exact, other)
        )
        assert found.nll[place] == pytest.approx(-theirs[np.arange(5), ids[1:]].mean(), rel=1e-5)
        assert found.kl_divergence[place] == pytest.approx(
            (np.exp(ours) * (ours - theirs)).sum(axis=1).mean(), rel=1e-5
        )
        assert found.agreement[place] == (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()
