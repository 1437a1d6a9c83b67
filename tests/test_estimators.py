"""The estimators as functions: the written-out formulas, extreme weights, types and refusals.

What the paper says of them is in test_theory.py.
"""
import math

import pytest
import torch

from tsallis_rl import (garl_coefficients, grpo_coefficients, log_q, paft_coefficients, resample, tsallis_loss)

QS = (0.0, 0.25, 0.5, 0.75, 1.0)


def test_grpo_expected_direction_is_that_of_the_reward_and_silence_is_exactly_zero():
    a, b = grpo_coefficients(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    assert torch.equal(a, b) and not a[:2].any()
    assert a[2, 0] > 0 > a[2, 1] and a[2].sum().abs() < 1e-6
    assert a[2, 0] == pytest.approx((1 - 1 / 3) / math.sqrt(1 / 3) / 3, rel=1e-6)
    with pytest.raises(ValueError):
        grpo_coefficients(torch.zeros(4, 1))


def test_the_q_logarithm_is_exact_at_one_and_does_not_cancel_beside_it():
    u = torch.tensor([1e-300, 1e-6, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(log_q(u, 1.0), u.log())
    for gap in (1e-12, 1e-14):
        torch.testing.assert_close(log_q(u, 1 - gap), u.log(), rtol=1e-9, atol=0)
    for q in QS[:-1]:
        torch.testing.assert_close(log_q(u, q), (u ** (1 - q) - 1) / (1 - q), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(tsallis_loss(u.log(), q), -log_q(u, q), rtol=1e-12, atol=1e-15)
    assert log_q(0.5, 0.0).item() == pytest.approx(-0.5)


def test_the_loss_is_finite_and_differentiable_however_small_P_is():
    for q in QS + (1 - 1e-12,):
        log_P = torch.tensor([-1e4, -13.0, 0.0], requires_grad=True)
        loss = tsallis_loss(log_P, q)
        loss.sum().backward()
        assert loss.isfinite().all() and log_P.grad.isfinite().all()
        assert log_P.grad[2] == -1 and loss[2] == 0  # d l_q / d log P = -P^(1-q)
        assert torch.autograd.gradcheck(lambda x: tsallis_loss(x, q), torch.tensor([-3.0, -0.1], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("log_w", ([-1e4] * 4, [0.0] * 4, [0.0, -1e4, -1e4, -1e4], [-1e4, -9999.0, -800.0, -3.0], [-745.0, -746.0, -1e3, -1e4]))
def test_coefficients_stay_finite_for_any_mixture_of_weights(q, log_w):
    log_w = torch.tensor(log_w)
    a, b = garl_coefficients(log_w, q)
    n = resample(log_w, 4)
    assert n.sum() == 4 and n.dtype == torch.float64
    for x in (a, b, *paft_coefficients(log_w, q, n)):
        assert x.isfinite().all() and x.shape == log_w.shape and x.dtype == log_w.dtype and not x.requires_grad
    assert (4 * b).max() <= 1 + 1e-6  # the effective reward never exceeds 1
    assert b[log_w.argmax()] == b.max()


@pytest.mark.parametrize("q", QS)
def test_the_coefficients_are_the_written_out_formulas(q):
    w, n, K = [0.5, 0.1, 0.02, 0.3], [2.0, 0.0, 1.0, 3.0], 6
    M, wbar = len(w), sum(w) / len(w)
    others = [(sum(w) - x) / (M - 1) for x in w]  # wbar_{-m}: the mean of M - 1
    c = [x / wbar**q - y ** (1 - q) for x, y in zip(w, others)]  # (12)
    log_w = torch.tensor(w, dtype=torch.float64).log()
    a, b = garl_coefficients(log_w, q)
    assert a.tolist() == pytest.approx([x / (M * M**q) for x in c], rel=1e-12)
    assert b.tolist() == pytest.approx([x / wbar**q / (M * M**q) for x in w], rel=1e-12)
    a, b = paft_coefficients(log_w, q, torch.tensor(n, dtype=torch.float64))
    assert torch.equal(a, b) and a.tolist() == pytest.approx([wbar ** (1 - q) * k / (K * M**q) for k in n], rel=1e-12)


def test_leave_one_out_does_not_cancel_when_one_weight_dominates():
    log_w, q = torch.tensor([0.0, -80.0, -81.0], dtype=torch.float64), 0.5
    a, _ = garl_coefficients(log_w, q)
    others = (math.exp(-80) + math.exp(-81)) / 2  # what is left without the dominant one; 1 + others - 1 would be 0
    wbar = (1 + 2 * others) / 3
    assert a[0].item() * 3 * 3**q == pytest.approx(1 / wbar**q - others ** (1 - q), rel=1e-12)
    tiny, _ = garl_coefficients(torch.tensor([0.0, -80.0], dtype=torch.float64), 0.0)
    assert tiny[0].item() == pytest.approx((1 - math.exp(-80)) / 2, rel=1e-12)
    assert garl_coefficients(torch.tensor([-50.0, -80.0], dtype=torch.float64), 0.0)[0][0].item() == pytest.approx(math.exp(-50) / 2, rel=1e-12)


def test_where_no_rollout_succeeds_the_estimators_still_have_a_gradient_and_grpo_has_none():
    log_w = torch.tensor([-13.0, -14.0, -15.0, -18.0])  # P near 1e-6
    for q in QS:
        assert garl_coefficients(log_w, q)[0].abs().min() > 0 and paft_coefficients(log_w, q, resample(log_w, 4))[0].sum() > 0
    ratios = [garl_coefficients(log_w, q)[1].sum() / garl_coefficients(log_w, 0.0)[1].sum() * 4**q for q in QS]
    P = log_w.exp().mean()
    assert [r.item() for r in ratios] == pytest.approx([(P**-q).item() for q in QS], rel=1e-4)  # amplified by P^-q
    assert not grpo_coefficients(torch.zeros(4))[0].any()


def test_the_resampling_draws_K_by_likelihood_and_repeats_itself_with_the_same_generator():
    log_w, K = torch.tensor([[-1.0, -2.0, -3.0], [-1e4, -1e4, -9990.0], [-1e4, -1e4, -1e4]]), 200_000
    n = resample(log_w, K, torch.Generator().manual_seed(7))
    assert torch.equal(n, resample(log_w, K, torch.Generator().manual_seed(7))) and n.shape == log_w.shape
    assert not torch.equal(n, resample(log_w, K, torch.Generator().manual_seed(8)))
    assert torch.equal(n, n.round()) and (n.sum(-1) == K).all()
    posterior = log_w.double().softmax(-1)  # (13)
    error = (posterior * (1 - posterior) / K).sqrt()
    assert ((n / K - posterior).abs() <= 5 * error + 1e-12).all()  # five standard errors of a share


def test_what_no_estimator_can_use_is_refused():
    log_w = torch.zeros(3, 1)
    with pytest.raises(ValueError):
        garl_coefficients(log_w, 0.5)
    garl_coefficients(log_w, 0.5, baseline=False)
    for q in (-0.1, 1.1, math.nan):
        for function in (garl_coefficients, lambda u, q: paft_coefficients(u, q, u), tsallis_loss, log_q):
            with pytest.raises(ValueError):
                function(torch.ones(3, 4), q)
    with pytest.raises(ValueError):
        resample(torch.zeros(4), 0)
