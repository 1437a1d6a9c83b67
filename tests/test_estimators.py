"""The estimators where numbers underflow or cancel. Their formulas are in test_theory.py."""
import math

import pytest
import torch
from tsallis_rl import garl_coefficients, log_q, paft_coefficients, resample, tsallis_loss

QS = (0.0, 0.25, 0.5, 0.75, 1.0)


def test_log_q():
    """The q-logarithm is log at q = 1, does not cancel beside it, and is -l_q elsewhere."""
    u = torch.tensor([1e-300, 1e-6, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(log_q(u, 1.0), u.log()) and log_q(0.5, 0.0).item() == -0.5
    for q in (1 - 1e-12, 1 - 1e-14):
        torch.testing.assert_close(log_q(u, q), u.log(), rtol=1e-9, atol=0)
    for q in QS[:-1]:
        plain = (u ** (1 - q) - 1) / (1 - q)
        torch.testing.assert_close(log_q(u, q), plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("q", QS + (1 - 1e-12,))
def test_loss_gradient(q):
    """The loss and d l_q / d log P = -P^(1-q) are finite however small P is."""
    log_P = torch.tensor([-1e4, -13.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = tsallis_loss(log_P, q)
    loss.sum().backward()
    assert loss.isfinite().all() and loss[2] == 0
    exact = [-math.exp((1 - q) * x) for x in (-1e4, -13.0, 0.0)]
    assert log_P.grad.tolist() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("log_w", ([-1e4] * 4, [0.0] * 4, [0.0, -1e4, -1e4, -1e4],
                                   [-745.0, -746.0, -1e3, -1e4]))
def test_extreme_weights(q, log_w):
    """Coefficients are finite for every mixture, and the effective reward is at most 1."""
    log_w = torch.tensor(log_w)
    a, b = garl_coefficients(log_w, q)
    for x in (a, b, *paft_coefficients(log_w, q, resample(log_w, 4))):
        assert x.isfinite().all() and x.shape == log_w.shape and not x.requires_grad
    assert (4 * b).max() <= 1 + 1e-6 and b[log_w.argmax()] == b.max()


def test_resample():
    """The draw has K rationales by likelihood, and repeats itself with its seed."""
    log_w, K = torch.tensor([[-1.0, -2.0, -3.0], [-1e4, -1e4, -9990.0], [-1e4] * 3]), 200_000
    draws = [resample(log_w, K, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    n, posterior = draws[0], log_w.double().softmax(-1)  # (13)
    assert torch.equal(n, draws[1]) and not torch.equal(n, draws[2]) and (n.sum(-1) == K).all()
    error = (posterior * (1 - posterior) / K).sqrt()
    assert ((n / K - posterior).abs() <= 5 * error + 1e-12).all()
