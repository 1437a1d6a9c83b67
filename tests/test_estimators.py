"""The mathematics, against autograd of the exact objective on a model small enough to enumerate.

The model: a rationale z in {0..Z-1} with p(z) = softmax(theta), answers with p(y | z) = softmax(phi[z]); the gold answer
is y = 0. An expectation is a sum over all Z^M pools of rollouts (and, for PAFT, over all M^K draws), never an average of
samples, so the only tolerance is float64 round-off: 1e-10.
"""
import itertools
import math

import pytest
import torch

from tsallis_rl import (garl_coefficients, grpo_coefficients, log_q, paft_coefficients, resample, surrogate_loss,
                        tsallis_loss)

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOL = 1e-10  # float64 sums over at most a few thousand pools


class Tiny:
    """A latent-variable model with Z rationales and Y answers; all parameters in one leaf vector."""

    def __init__(self, Z=3, Y=3, seed=0, shift=0.0):
        self.Z = Z
        generator = torch.Generator().manual_seed(seed)
        self.parameters = torch.randn(Z + Z * Y, generator=generator, dtype=torch.float64)
        self.parameters[Z::Y] -= shift  # a large shift makes the gold answer improbable
        self.parameters.requires_grad_()
        self.log_pz = self.parameters[:Z].log_softmax(-1)  # (Z,)
        self.log_py = self.parameters[Z:].view(Z, Y).log_softmax(-1)[:, 0]  # (Z,): log p(y* | z)
        self.log_P = (self.log_pz + self.log_py).logsumexp(-1)

    def grad(self, loss):
        return torch.autograd.grad(loss, self.parameters, retain_graph=True)[0]

    def pools(self, M):
        """Every pool of M rationales with its probability."""
        for pool in itertools.product(range(self.Z), repeat=M):
            z = torch.tensor(pool)
            yield z, self.log_pz[z].sum().exp().item()

    def expected_gradient(self, coefficients, M):
        """sum over pools of p(pool) times the gradient of the surrogate loss."""
        total = torch.zeros_like(self.parameters)
        for z, probability in self.pools(M):
            a, b = coefficients(self.log_py[z].detach())
            total += probability * self.grad(surrogate_loss(self.log_pz[z], self.log_py[z], a, b))
        return total


def all_draws(log_w, q, K):
    """E[PAFT coefficients | pool], by handing them every possible outcome of the resampling."""
    M, posterior = len(log_w), log_w.softmax(-1)
    mean = torch.zeros_like(log_w)
    for draw in itertools.product(range(M), repeat=K):
        n = torch.bincount(torch.tensor(draw), minlength=M).double()
        a, b = paft_coefficients(log_w, q, n)
        assert torch.equal(a, b)
        mean += posterior[list(draw)].prod() * a
    return mean, mean


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("shift", (0.0, 8.0))
def test_garl_with_and_without_baseline_and_paft_have_one_expected_gradient(q, shift):
    model, M = Tiny(shift=shift), 3
    plug_in = model.expected_gradient(lambda log_w: garl_coefficients(log_w, q, baseline=False), M)
    centred = model.expected_gradient(lambda log_w: garl_coefficients(log_w, q), M)
    paft = model.expected_gradient(lambda log_w: all_draws(log_w, q, M), M)
    paft_2 = model.expected_gradient(lambda log_w: all_draws(log_w, q, 2), M)
    assert plug_in.abs().max() > 0
    for other in (centred, paft, paft_2):
        torch.testing.assert_close(other, plug_in, rtol=0, atol=TOL)


@pytest.mark.parametrize("M", (2, 4))
def test_at_q_0_the_expected_gradient_is_the_exact_gradient_of_1_minus_P(M):
    model = Tiny()
    for baseline in (True, False):
        expected = model.expected_gradient(lambda log_w: garl_coefficients(log_w, 0.0, baseline), M)
        torch.testing.assert_close(expected, model.grad(tsallis_loss(model.log_P, 0.0)), rtol=0, atol=TOL)


def test_the_exact_gradient_is_the_rl_gradient_amplified_and_the_fine_tuning_gradient_attenuated():
    model = Tiny(shift=3.0)
    P = model.log_P.exp()
    for q in QS:
        exact = model.grad(tsallis_loss(model.log_P, q))
        torch.testing.assert_close(exact, P**-q * model.grad(1 - P), rtol=1e-12, atol=0)
        torch.testing.assert_close(exact, P ** (1 - q) * model.grad(-model.log_P), rtol=1e-12, atol=0)


def binomial_gradient(model, q, M):
    """E[GARL plug-in] for Z = 2 at any M: a pool is its number of ones; the M^q normaliser is taken out again."""
    total = torch.zeros_like(model.parameters)
    for ones in range(M + 1):
        z = torch.tensor([1] * ones + [0] * (M - ones))
        log_p = math.lgamma(M + 1) - math.lgamma(ones + 1) - math.lgamma(M - ones + 1) + model.log_pz[z].sum().item()
        a, b = garl_coefficients(model.log_py[z].detach(), q, baseline=False)
        total += math.exp(log_p) * M**q * model.grad(surrogate_loss(model.log_pz[z], model.log_py[z], a, b))
    return total


@pytest.mark.parametrize("q", QS[1:])
def test_the_bias_is_that_of_theorem_6_1(q):
    model = Tiny(Z=2, seed=1)
    pz, w, P = model.log_pz.exp().detach(), model.log_py.exp().detach(), model.log_P.exp().detach()
    g = torch.stack([-w[z] * model.grad(model.log_pz[z] + model.log_py[z]) for z in range(2)])  # (Z, parameters)
    variance = (pz * (w - P) ** 2).sum()
    covariance = ((pz * (w - P)).unsqueeze(-1) * g).sum(0)
    predicted = q / P ** (q + 1) * ((q + 1) / 2 * model.grad(-model.log_P) * variance - covariance)
    exact = model.grad(tsallis_loss(model.log_P, q))
    errors = [(M * (binomial_gradient(model, q, M) - exact) - predicted).abs().max().item() for M in (50, 100, 200)]
    # M times the bias tends to the prediction with error O(1/M): it halves as M doubles, to within a tenth
    assert errors[2] < 0.02 * predicted.abs().max()
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05) and errors[2] / errors[1] == pytest.approx(0.5, abs=0.05)


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


@pytest.mark.parametrize("q", QS)
def test_resampling_adds_exactly_the_variance_of_the_draws(q):
    # D.4 in one dimension: the gradient along one parameter, M = K = 3; the exact second moments, by enumeration
    model, M = Tiny(seed=3), 3
    plug_in, paft = [], []  # (probability, estimate)
    for z, probability in model.pools(M):
        log_w = model.log_py[z].detach()
        slope = torch.stack([model.grad(model.log_pz[k] + model.log_py[k])[0] for k in z])
        plug_in.append((probability, -(garl_coefficients(log_w, q, baseline=False)[0] * slope).sum()))
        for draw in itertools.product(range(M), repeat=M):
            n = torch.bincount(torch.tensor(draw), minlength=M)
            scale = ((1 - q) * (log_w.logsumexp(-1) - math.log(M))).exp() / (M * M**q)
            paft.append((probability * log_w.softmax(-1)[list(draw)].prod().item(), -(scale * n * slope).sum()))
    mean = [sum(p * g for p, g in estimates) for estimates in (plug_in, paft)]
    variance = [sum(p * (g - m) ** 2 for p, g in estimates) for estimates, m in zip((plug_in, paft), mean)]
    within = sum(sum(p * (g - centre) ** 2 for p, g in paft[27 * i:27 * i + 27]) for i, (_, centre) in enumerate(plug_in))
    torch.testing.assert_close(mean[1], mean[0], rtol=0, atol=TOL)
    torch.testing.assert_close(variance[1], variance[0] + within, rtol=1e-9, atol=0)
    assert within > 0


def test_where_no_rollout_succeeds_the_estimators_still_have_a_gradient_and_grpo_has_none():
    log_w = torch.tensor([-13.0, -14.0, -15.0, -18.0])  # P near 1e-6
    for q in QS:
        assert garl_coefficients(log_w, q)[0].abs().min() > 0 and paft_coefficients(log_w, q, resample(log_w, 4))[0].sum() > 0
    ratios = [garl_coefficients(log_w, q)[1].sum() / garl_coefficients(log_w, 0.0)[1].sum() * 4**q for q in QS]
    P = log_w.exp().mean()
    assert [r.item() for r in ratios] == pytest.approx([(P**-q).item() for q in QS], rel=1e-4)  # amplified by P^-q
    assert not grpo_coefficients(torch.zeros(4))[0].any()


def test_at_q_1_garl_is_the_iwae_gradient_and_its_centred_weights_sum_to_zero():
    log_w = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4 - 9
    a, b = garl_coefficients(log_w, 1.0)
    torch.testing.assert_close(a.sum(-1), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(8 * b, log_w.softmax(-1), rtol=1e-12, atol=0)  # M^q = 8: normalised importance weights


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


def test_the_paper_s_escort_minimiser_is_where_the_loss_is_stationary():
    # Thm 3.1: free categorical theta, frequencies alpha: the minimum of sum_j alpha_j (-log_q theta_j) is alpha^(1/q), normalised
    alpha = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for q in QS[1:]:
        logits = (alpha.log() / q).requires_grad_()
        loss = (alpha * tsallis_loss(logits.log_softmax(-1), q)).sum()
        assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12
