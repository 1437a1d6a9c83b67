"""The paper's statements as executable claims, in its order; numbers of equations and theorems are those of v1.

The model can be enumerated: a softmax over Z rationales, for each a softmax over Y answers, in float64; the gold answer
is number 0. An expectation is a sum over all pools of M rollouts and all resamples of K, through the project's own
functions, never an average of samples; the time of a gradient flow is an integral by Gauss' rule. A tolerance is for
round-off unless a comment says otherwise, and a limit is tested by the rate at which it is approached.
"""
import itertools
import math
import statistics
from unittest import mock

import numpy
import pytest
import torch
import torch.nn.functional as F

from tsallis_rl import (garl_coefficients, grpo_coefficients, log_q, make_optimizer, paft_coefficients, resample,
                        surrogate_loss, tsallis_loss)

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
every_q, q_above_0 = (pytest.mark.parametrize("q", qs) for qs in (QS, QS[1:]))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def equal(actual, expected, tolerance=1e-12):
    """All entries, to `tolerance` of the largest."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def slope(x, y):
    """The exponent k of y = const x^k, fitted by least squares."""
    return numpy.polyfit(numpy.log(x), numpy.log(y), 1)[0]


def derivative(f, x):
    """f'(x), elementwise."""
    x = torch.as_tensor(x, dtype=torch.float64).detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def integral(f, start, end):
    """Gauss' rule with 20 nodes on pieces no longer than 1."""
    nodes, weights = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(20))
    half = (end - start) / math.ceil(end - start) / 2
    middle = start + half * (2 * torch.arange(math.ceil(end - start)).double() + 1).unsqueeze(-1)
    return (half * weights * f(middle + half * nodes)).sum().item()


def runge_kutta(velocity, x, dt):
    a = velocity(x)
    b = velocity(x + dt / 2 * a)
    c = velocity(x + dt / 2 * b)
    return x + dt / 6 * (a + 2 * b + 2 * c + velocity(x + dt * c))


class Model:
    """p(z) = softmax(theta), p(y | z) = softmax(phi[z]); all parameters in one leaf vector."""

    def __init__(self, parameters, Z=3):
        self.parameters = parameters.detach().requires_grad_()
        self.log_pz = self.parameters[:Z].log_softmax(-1)  # (Z,)
        self.log_pyz = self.parameters[Z:].view(Z, -1).log_softmax(-1)  # (Z, Y): log p(y | z)
        self.log_py = self.log_pyz[:, 0]  # (Z,): log w of a rationale, log p(y* | z)
        self.log_P = (self.log_pz + self.log_py).logsumexp(-1)

    def grad(self, loss):
        return torch.autograd.grad(loss, self.parameters, retain_graph=True)[0]

    def estimate(self, z, a, b):
        """The gradient of the surrogate loss for the gold answer, summed over pools z: (N, M) -> (parameters,)."""
        return self.grad(surrogate_loss(self.log_pz[z], self.log_py[z], a, b))

    def pools(self, M):
        """Every pool of M rationales, its log w and its probability: (Z^M, M), (Z^M, M), (Z^M, 1)."""
        z = torch.cartesian_prod(*[torch.arange(len(self.log_pz))] * M)
        return z, self.log_py[z].detach(), self.log_pz[z].sum(-1, keepdim=True).exp().detach()

    def expected(self, coefficients, M):
        """E[estimate] over the pools: as the surrogate loss is linear in a and b, that of the expected coefficients."""
        z, log_w, probability = self.pools(M)
        a, b = coefficients(log_w)
        return self.estimate(z, probability * a, probability * b)


def random_model(Z=3, Y=3, seed=0, shift=0.0):
    """A large shift makes the gold answer improbable."""
    parameters = torch.randn(Z + Z * Y, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameters[Z::Y] -= shift
    return Model(parameters, Z)


def model_of(pz, w):
    """The model of these p(z) and w = p(y* | z), with two wrong answers."""
    return Model(torch.cat([pz, torch.stack([w, (1 - w) * 2 / 3, (1 - w) / 3], -1).flatten()]).log(), len(pz))


def every_resample(log_w, K):
    """`resample`'s counts at all outcomes of its draw, and their probabilities: (N, M) -> (N, M^K, M), (N, M^K, 1)."""
    M = log_w.shape[-1]
    outcomes = torch.cartesian_prod(*[torch.arange(M)] * K).view(-1, K).repeat(len(log_w), 1)  # (N M^K, K)

    def draw(p, k, replacement, generator):
        assert k == K and replacement
        weights.append(p / p.sum(-1, keepdim=True))
        return outcomes

    weights = []
    with mock.patch("torch.multinomial", draw):  # each row of log w draws one outcome
        n = resample(log_w.repeat_interleave(M**K, 0), K)
    return n.view(len(log_w), -1, M), weights[0].gather(-1, outcomes).prod(-1).view(len(log_w), -1, 1)


def paft(log_w, q, K):
    """E[PAFT's coefficients | pool]."""
    n, probability = every_resample(log_w, K)
    a, b = paft_coefficients(log_w.unsqueeze(-2).expand_as(n), q, n)
    return (probability * a).sum(-2), (probability * b).sum(-2)


# --- Section 3, A, B: the loss ---------------------------------------------------------------------------------------
def test_prop_a1_at_q_0_the_loss_is_1_minus_the_expected_exact_match_reward():
    models = [random_model(seed=seed, shift=shift) for seed, shift in ((0, 0.0), (1, 2.0), (2, 9.0))]
    reward = torch.eye(3, dtype=torch.float64)[0]  # r(y) = [y = y*]
    expected = torch.stack([((m.log_pz.unsqueeze(-1) + m.log_pyz).exp() * reward).sum() for m in models]).mean()
    log_P = torch.stack([m.log_P for m in models])
    equal(expected, log_P.exp().mean())
    equal(tsallis_loss(log_P, 0.0).mean(), 1 - expected)


@every_q
def test_b1_dispersion_is_penalised_and_the_second_order_is_half_q_variance(q):
    mean, deviation = vector(0.4), vector(-0.3, -0.1, 0.15, 0.25)  # of mean 0
    excess = lambda t: (tsallis_loss((mean + t * deviation).log(), q).mean() + log_q(mean, q)).item()
    assert abs(excess(0)) < 1e-15  # equality where P is constant
    if q == 0:  # and everywhere at q = 0, where the loss is linear
        assert abs(excess(1)) < 1e-15
        return
    assert all(excess(t) > 0 for t in (0.01, 0.1, 0.5, 1))
    second = (q / 2 * mean ** (-q - 1) * deviation.square().mean()).item()
    errors = [abs(excess(t) / t**2 / second - 1) for t in (0.004, 0.002, 0.001)]
    assert slope((0.004, 0.002, 0.001), errors) == pytest.approx(1, abs=0.01)  # the third order is left, as O(t)


def simplex(n, parts):
    """Every distribution over n outcomes whose probabilities are multiples of 1 / parts."""
    return vector(*(t for t in itertools.product(range(parts + 1), repeat=n) if sum(t) == parts)) / parts


def expected_loss(theta, alpha, q):
    return (alpha * tsallis_loss(theta.log(), q)).sum(-1)


def escort(alpha, q):
    return alpha.pow(1 / q) / alpha.pow(1 / q).sum()


def minimiser(alpha, q):
    """argmin of the expected loss over a softmax, by L-BFGS from the uniform distribution."""
    logits = torch.zeros_like(alpha, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=1000, tolerance_grad=1e-15, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(logits.softmax(-1), alpha, q)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


FREQUENCIES = (vector(0.6, 0.3, 0.1), vector(0.35, 0.25, 0.2, 0.15, 0.05), vector(0.9, 0.1))


@q_above_0
def test_thm_3_1_the_minimiser_found_by_optimisation_is_the_escort_distribution(q):
    for alpha in FREQUENCIES:
        theta = minimiser(alpha, q)
        equal(theta, escort(alpha, q), 1e-7)  # an optimum is flat: its place is known to the root of round-off
        gradient = derivative(lambda x: expected_loss(x.softmax(-1), alpha, q), escort(alpha, q).log())
        assert gradient.abs().max() < 1e-15


def test_thm_3_1_at_q_0_the_minimum_is_at_any_mode():
    thetas = simplex(3, 20)
    for alpha, modes, minima in ((vector(0.6, 0.3, 0.1), 1, 1), (vector(0.4, 0.4, 0.2), 2, 21)):
        loss = expected_loss(thetas, alpha, 0.0)
        equal(loss.min(), 1 - alpha.max())
        best = thetas[loss < loss.min() + 1e-12]
        assert len(best) == minima and not best[:, modes:].any()  # the mode; of two modes any mixture


def test_b2_the_minimiser_is_alpha_at_q_1_and_sharpens_to_the_mode_as_q_falls():
    for alpha in FREQUENCIES:  # in falling order
        found = [minimiser(alpha, q) for q in (1.0, 0.75, 0.5, 0.25)]
        equal(found[0], alpha, 1e-7)
        ratios = torch.stack([theta[:-1] / theta[1:] for theta in found])
        assert (ratios[1:] > ratios[:-1]).all()
        for q in (0.04, 0.02, 0.01):  # where an optimiser cannot tell it from the mode
            gradient = derivative(lambda x: expected_loss(x.softmax(-1), alpha, q), alpha.log() / q)
            assert gradient.abs().max() < 1e-15
            assert 1 - escort(alpha, q)[0] < len(alpha) * (alpha[1] / alpha[0]) ** (1 / q)


def test_b3_the_loss_is_strictly_proper_at_q_1_alone():
    for alpha in FREQUENCIES:
        others = simplex(len(alpha), 12)
        others = others[(others > 0).all(-1)]  # none of them is alpha
        regret = expected_loss(others, alpha, 1.0) - expected_loss(alpha, alpha, 1.0)
        equal(regret, (alpha * (alpha / others).log()).sum(-1), 1e-14)  # the Kullback-Leibler divergence
        assert (regret > 0).all()
        for q in QS[1:-1]:
            assert expected_loss(escort(alpha, q), alpha, q) < expected_loss(alpha, alpha, q) - 1e-3
        mode = torch.eye(len(alpha), dtype=torch.float64)[0]
        assert expected_loss(mode, alpha, 0.0) < expected_loss(alpha, alpha, 0.0) - 1e-3


# --- Section 4: one direction, one scalar ----------------------------------------------------------------------------
@every_q
def test_prop_4_1_the_gradient_is_the_rl_gradient_amplified_and_the_fine_tuning_gradient_attenuated(q):
    for shift in (0.0, 3.0, 12.0):
        model = random_model(shift=shift)
        P, exact = model.log_P.exp(), model.grad(tsallis_loss(model.log_P, q))
        equal(exact, P**-q * model.grad(1 - P), 1e-10)  # autograd's derivative of expm1 is off by 1e-16 / P^(1-q)
        equal(exact, P ** (1 - q) * model.grad(-model.log_P), 1e-10)


# --- Section 5, C: the speed of commitment ---------------------------------------------------------------------------
@every_q
def test_eq_6_under_gradient_flow_p_moves_at_p_to_the_2_minus_q_times_the_squared_score(q):
    for shift in (0.0, 6.0):
        model = random_model(shift=shift)
        P, score = model.log_P.exp(), model.grad(model.log_P)
        speed = model.grad(P) @ -model.grad(tsallis_loss(model.log_P, q))
        equal(speed, P ** (2 - q) * score @ score)


def logit(p):
    return math.log(p) - math.log1p(-p)


def escape_time(q, p0, delta):
    """(15), the integral of du / (u^(2-q) (1-u)^2) from p0 to delta, over theta with u = sigmoid(theta)."""
    def integrand(theta):
        u, fails = theta.sigmoid(), (-theta).sigmoid()
        return 1 / (u ** (2 - q) * fails**2) * u * fails  # du = u (1-u) d theta

    return integral(integrand, logit(p0), logit(delta))


def sigmoid_velocity(theta, q):
    """d theta / dt of the gradient flow where P = sigmoid(theta)."""
    return -derivative(lambda x: tsallis_loss(F.logsigmoid(x), q), theta)


@every_q
def test_eq_15_is_the_time_of_the_integrated_flow(q):
    theta = torch.linspace(logit(1e-3), logit(0.9), 101, dtype=torch.float64)
    p, reached = theta.sigmoid().tolist(), theta[:-1]
    time = vector(*map(escape_time, [q] * 100, p, p[1:]))
    for _ in range(20):  # side by side over the hundred parts of the way, each for as long as (15) says
        reached = runge_kutta(lambda x: sigmoid_velocity(x, q), reached, time / 20)
    equal(reached, theta[1:])


def test_thm_5_1_and_5_2_the_escape_time_grows_as_p0_to_the_q_minus_1_and_at_q_1_as_a_logarithm():
    p0 = [10.0**-k for k in range(60, 81, 5)]
    times = {q: [escape_time(q, p, 0.5) for p in p0] for q in QS}
    for q in QS[:-1]:  # what (15) adds to the leading terms of C.1 is a share of 1e-15 here and less
        assert times[q] == pytest.approx([p ** (q - 1) / (1 - q) for p in p0], rel=1e-12)
        assert slope(p0, times[q]) == pytest.approx(-(1 - q), abs=1e-12)
    assert times[1] == pytest.approx([math.log(1 / p) + 1 for p in p0], rel=1e-12)  # delta = 1/2
    assert slope(p0, times[1]) == pytest.approx(-statistics.fmean(1 / t for t in times[1]), rel=0.01)  # 0, in the limit
    for q, faster in itertools.combinations(QS[:-1], 2):
        ratio = [slow / fast for slow, fast in zip(times[q], times[faster])]
        assert slope(p0, ratio) == pytest.approx(-(faster - q), abs=1e-12)


@every_q
def test_thm_5_1_and_5_2_bound_the_escape_of_a_model_by_its_largest_and_smallest_score(q):
    # T is C^-2 to c^-2 times the integral of du / u^(2-q), which grows as p0^-(1-q) or log 1/p0; no p0 moves c and C
    def velocity(parameters):
        model = Model(parameters)
        return -model.grad(tsallis_loss(model.log_P, q))

    times, squares = [], []
    for shift in (5.0, 10.0, 15.0):
        model, T = random_model(shift=shift), 0.0
        p0 = model.log_P.exp().item()
        while model.log_P < math.log(0.5):
            squares.append(model.grad(model.log_P).square().sum().item())
            dt = 0.2 * math.exp((q - 1) * model.log_P.item())  # log P moves by 0.2 |s|^2 a step
            model, T = Model(runge_kutta(velocity, model.parameters.detach(), dt)), T + dt
        P = model.log_P.exp().item()
        times.append((T, math.log(P / p0) if q == 1 else (p0 ** (q - 1) - P ** (q - 1)) / (1 - q)))
    assert all(bound / max(squares) <= T <= bound / min(squares) for T, bound in times)
    assert 0.3 < min(squares) < max(squares) < 1.6


def test_c4_near_success_the_speed_does_not_depend_on_q():
    eps0 = (1e-3, 1e-4, 1e-5)
    for q, other in itertools.combinations(QS, 2):
        speed = [sigmoid_velocity(logit(1 - e), q).item() / sigmoid_velocity(logit(1 - e), other).item() for e in eps0]
        time = [escape_time(q, 1 - e, 1 - e / 10) / escape_time(other, 1 - e, 1 - e / 10) for e in eps0]
        for e, v, t in zip(eps0, speed, time):  # 1 + O(eps0), with its constants; the rest is O(eps0^2)
            assert v - 1 == pytest.approx(-(other - q) * e, abs=2 * e**2 + 1e-14)
            assert t - 1 == pytest.approx((other - q) * math.log(10) / 9 * e, abs=2 * e**2 + 1e-14)


def noisy_velocity(u, q, eps):
    """d ptilde / dt at ptilde = u, with a share eps of flipped labels, where ptilde itself is the parameter (C.5)."""
    return eps * u**-q - (1 - eps) * (1 - u) ** -q


def contamination_time(q, eps, start, eta):
    return integral(lambda x: x.exp() / noisy_velocity(x.exp(), q, eps), math.log(start), math.log(eta))


@q_above_0
@pytest.mark.parametrize("eps", (0.05, 0.2))
def test_eq_17_under_label_noise_the_equilibrium_is_the_escort_distribution(q, eps):
    odds = (eps / (1 - eps)) ** (1 / q)
    wrong, clean = escort(vector(eps, 1 - eps), q)
    assert wrong / clean == pytest.approx(odds, rel=1e-12)
    at = odds / (1 + odds)
    assert abs(noisy_velocity(at, q, eps)) < 1e-12 * eps * at**-q  # of either of the two terms that cancel
    u = (torch.arange(1000).double() + 0.5) / 1000
    loss = lambda x: (1 - eps) * tsallis_loss(torch.log1p(-x), q) + eps * tsallis_loss(x.log(), q)
    equal(-derivative(loss, u), noisy_velocity(u, q, eps))
    assert ((noisy_velocity(u, q, eps) > 0) == (u < at)).all()  # the only one, approached from both sides
    found = minimiser(vector(1 - eps, eps), q)  # to the root of round-off
    assert (found[1] / found[0]).item() == pytest.approx(odds, rel=1e-6)


@q_above_0
def test_eq_18_the_time_to_contamination_grows_as_eta_to_the_q_plus_1_over_eps(q):
    leading = lambda eta, eps: eta ** (q + 1) / ((q + 1) * eps)
    time = lambda eta, eps: contamination_time(q, eps, eta * 1e-20, eta)  # what comes before is 1e-20 of it and less
    etas = [10.0**-k for k in range(40, 61, 5)]
    assert slope(etas, [time(eta, 0.1) for eta in etas]) == pytest.approx(q + 1, abs=1e-8)  # eta^q / eps is left
    for eps in (0.05, 0.2):
        assert time(1e-60, eps) == pytest.approx(leading(1e-60, eps), rel=1e-12)
        odds = (eps / (1 - eps)) ** (1 / q)
        eta = odds / 2 / (1 + odds / 2)  # halfway to equilibrium it is still Theta, with these constants:
        assert leading(eta, eps) < time(eta, eps) < leading(eta, eps) / (1 - 0.5**q)


@q_above_0
def test_eq_18_is_for_the_probability_as_the_parameter_a_softmax_takes_the_escape_time_over_eps(q):
    # d ptilde / d logit = ptilde (1 - ptilde) enters twice; from ptilde = 0 itself such a model never starts
    def integrand(x):
        u = x.exp()
        return u / (noisy_velocity(u, q, eps) * (u * (1 - u)) ** 2)

    p0, eta, eps = 1e-100, 1e-30, 0.1
    time = integral(integrand, math.log(p0), math.log(eta))
    leading = math.log(eta / p0) if q == 1 else p0 ** (q - 1) / (1 - q)
    assert time == pytest.approx(leading / eps, rel=1e-12)


def test_c5_high_q_commits_fast_to_clean_and_to_wrong_supervision_alike_and_q_0_to_no_wrong_one():
    clean = [escape_time(q, 1e-3, 0.5) for q in QS]
    wrong = [contamination_time(q, 0.2, 1e-24, 1e-4) for q in QS[1:]]
    for times in (clean, wrong):
        assert all(faster < slower for slower, faster in zip(times, times[1:]))
    for eps in (0.01, 0.2, 0.49):  # at q = 0 ptilde falls everywhere, also at 0
        equal(noisy_velocity(vector(0, 1e-9, 0.5, 0.99), 0.0, eps), vector(*[2 * eps - 1] * 4))


# --- Section 6, D: the estimators ------------------------------------------------------------------------------------
@every_q
@pytest.mark.parametrize("shift", (0.0, 8.0))
def test_prop_6_2_the_leave_one_out_baseline_changes_no_expectation(q, shift):
    model = random_model(shift=shift)
    for M in (2, 3, 4):
        plug_in = model.expected(lambda log_w: garl_coefficients(log_w, q, baseline=False), M)
        equal(model.expected(lambda log_w: garl_coefficients(log_w, q), M), plug_in)


@every_q
@pytest.mark.parametrize("shift", (0.0, 8.0))
def test_d3_the_mean_of_paft_given_the_pool_is_garl_s_plug_in_so_their_expectations_agree(q, shift):
    model = random_model(shift=shift)
    for M, K in ((2, 3), (3, 1), (3, 2), (3, 3)):
        _, log_w, _ = model.pools(M)
        plug_in = garl_coefficients(log_w, q, baseline=False)
        for x, y in zip(paft(log_w, q, K), plug_in):
            equal(x, y)
        equal(model.expected(lambda log_w: paft(log_w, q, K), M), model.expected(lambda log_w: plug_in, M))


@every_q
def test_d4_resampling_adds_exactly_the_variance_of_the_draws(q):
    model, M = random_model(seed=3), 3
    z, log_w, p_pool = model.pools(M)
    scores = torch.stack([model.grad(s) for s in model.log_pz + model.log_py])[z]  # (N, M, parameters)
    plug_in = (garl_coefficients(log_w, q, baseline=False)[0].unsqueeze(-1) * scores).sum(-2)  # (N, parameters)
    n, p_draw = every_resample(log_w, M)
    a, b = paft_coefficients(log_w.unsqueeze(-2).expand_as(n), q, n)
    estimate = (a.unsqueeze(-1) * scores.unsqueeze(1)).sum(-2)  # (N, M^K, parameters)
    mean = (p_pool * plug_in).sum(0)
    within = (p_pool.unsqueeze(-1) * p_draw * (estimate - plug_in.unsqueeze(1)).square()).sum((0, 1))
    variance = (p_pool.unsqueeze(-1) * p_draw * (estimate - mean).square()).sum((0, 1))
    assert torch.equal(a, b) and (within > 0).all()
    equal(variance, (p_pool * (plug_in - mean).square()).sum(0) + within)


@pytest.mark.parametrize("M", (2, 4))
def test_thm_6_1_at_q_0_the_expected_gradient_is_exact(M):
    model = random_model()
    for baseline in (True, False):
        expected = model.expected(lambda log_w: garl_coefficients(log_w, 0.0, baseline), M)
        equal(expected, model.grad(tsallis_loss(model.log_P, 0.0)))


def biases(model, M, q):
    """(bias of GARL's expected gradient, bias of its factor wbar^-q), for two rationales and any M; PAFT's too (D.3).

    A pool is k rollouts of rationale 1 after M - k of rationale 0, in M over k orders. Left out are the k that are 10
    standard deviations off: together less than 1e-20 of the probability. The normaliser M^q is taken out again.
    """
    (log_p0, log_p1), (log_w0, log_w1) = model.log_pz.tolist(), model.log_py.tolist()
    mean, per_rationale, factor = M * math.exp(log_p1), torch.zeros(2, dtype=torch.float64), 0.0
    reach = 10 * math.sqrt(mean) + 20
    for k in range(max(0, int(mean - reach)), min(M, int(mean + reach)) + 1):
        log_w = torch.full((M,), log_w0, dtype=torch.float64)
        log_w[M - k:] = log_w1
        a, b = garl_coefficients(log_w, q, baseline=False)
        log_orders = math.lgamma(M + 1) - math.lgamma(k + 1) - math.lgamma(M - k + 1)
        probability = math.exp(log_orders + k * log_p1 + (M - k) * log_p0)
        per_rationale += probability * M**q * torch.stack([(M - k) * a[0], k * a[-1]])
        factor += probability * M**q * M * b[-1].item() / log_w[-1].exp().item()
    gradient = model.estimate(torch.arange(2), per_rationale, per_rationale)
    return gradient - model.grad(tsallis_loss(model.log_P, q)), factor - model.log_P.exp().item() ** -q


def bracket(model):
    """Var(w) and Cov(g, w), g = -w grad log p(z, y*), and the largest |grad log p(z, y*)|."""
    pz, w, P = (x.exp().detach() for x in (model.log_pz, model.log_py, model.log_P))
    scores = torch.stack([model.grad(s) for s in model.log_pz + model.log_py])
    centred = pz * (w - P)
    return (centred * (w - P)).sum(), -(centred * w) @ scores, scores.norm(dim=-1).max()


def leading_term(model, q):
    """Thm 6.1: M times the leading term of the bias."""
    variance, covariance, _ = bracket(model)
    return q * model.log_P.exp().detach() ** -(q + 1) * ((q + 1) / 2 * model.grad(-model.log_P) * variance - covariance)


@q_above_0
def test_thm_6_1_the_error_of_the_leading_term_of_the_bias_falls_as_m_to_the_minus_2(q):
    model, Ms = random_model(Z=2, seed=1), (256, 512, 1024)
    errors = [(biases(model, M, q)[0] - leading_term(model, q) / M).norm().item() for M in Ms]
    assert slope(Ms, errors) == pytest.approx(-2, abs=0.02)  # the next order is a share 1/M of it
    assert errors[-1] < 0.01 * leading_term(model, q).norm() / Ms[-1]


def small_everywhere(P):
    """Success is unlikely after any rationale: w = (P/2, 3P/2), so its shape does not change with P."""
    return model_of(vector(0.5, 0.5), vector(P / 2, 3 * P / 2))


def rare(P):
    """A good rationale, w = 1/2, is rare, of probability P; that makes half of P. After the other, w is about P/2."""
    return model_of(vector(1 - P, P), vector(P / 2 / (1 - P), 0.5))


@q_above_0
@pytest.mark.parametrize("M", (4, 32))
def test_thm_6_1_with_the_shape_of_w_fixed_the_bias_is_p_to_the_1_minus_q_a_constant_share_of_the_gradient(q, M):
    # neither v1's P^-(q+1) nor v2's P^-q, which bound it: Var(w) and Cov(g, w) fall as P^2
    Ps = [10.0**-k for k in range(3, 8)]
    sizes = [biases(small_everywhere(P), M, q)[0].norm().item() for P in Ps]
    assert slope(Ps, sizes) == pytest.approx(1 - q, abs=1e-3)  # the softmax over answers differs by O(P)


@q_above_0
def test_thm_6_1_where_success_is_rare_the_bias_has_v2_s_order_and_its_factor_wbar_to_the_minus_q_v1_s(q):
    # Var(w) and Cov(g, w) fall as P. The expansion is for large M P, to which 4 comes within 6 per cent
    Ps, enumerated, leading, factors, leading_factors = [10**-(k + 1.5) for k in range(5)], [], [], [], []
    for model, P in ((rare(P), P) for P in Ps):
        M = round(4 / P)
        gradient, factor = biases(model, M, q)
        enumerated.append(M * gradient.norm().item())
        leading.append(leading_term(model, q).norm().item())
        factors.append(M * factor)
        leading_factors.append(q * (q + 1) / 2 * P ** (-q - 2) * bracket(model)[0].item())
    assert enumerated == pytest.approx(leading, rel=0.06) and factors == pytest.approx(leading_factors, rel=0.06)
    assert slope(Ps, enumerated) == pytest.approx(-q, abs=0.01)  # P = 0.03, the largest, is not yet small
    assert slope(Ps, factors) == pytest.approx(-(q + 1), abs=0.01)


@q_above_0
def test_thm_6_1_does_not_apply_where_m_p_is_small_there_the_bias_takes_most_of_the_gradient(q):
    M, model = 32, rare(1e-6)
    gradient = model.grad(tsallis_loss(model.log_P, q)).norm()
    share, leading_share = biases(model, M, q)[0].norm() / gradient, leading_term(model, q).norm() / M / gradient
    assert share < 1 < 1000 < leading_share


@q_above_0
def test_thm_6_1_v2_s_order_bounds_the_leading_term_of_any_model_with_bounded_scores(q):
    # as w <= 1, E[w^2] <= P: scores up to C bound the bracket by 2 C P, so v1's extra 1/P is never needed
    Ps = [10.0**-k for k in range(1, 8)]
    for model in (*map(rare, Ps), *map(small_everywhere, Ps), *(random_model(seed=k, shift=k) for k in range(20))):
        assert leading_term(model, q).norm() <= 2 * q * bracket(model)[2] * model.log_P.exp() ** -q


@every_q
def test_m_to_the_q_is_the_largest_effective_reward_and_is_reached_by_one_certain_rationale_alone(q):
    M = 4
    log_w = torch.cartesian_prod(*[vector(-1e4, -5.0, -0.5, 0.0)] * M)
    a, b = garl_coefficients(log_w, q)
    reward, centred = M * b, M * a  # (w_m / wbar^q) / M^q and c_m / M^q
    assert 0 <= reward.min() and reward.max() == pytest.approx(1, abs=1e-14) and centred.min() > -1 - 1e-14
    certain, alone = (log_w == 0).any(-1), (log_w > -1e4).sum(-1) == 1
    reached = {0.0: certain, 1.0: alone}.get(q, certain & alone)  # q = 0 has no wbar, q = 1 no scale
    assert torch.equal(reward.max(-1).values > 1 - 1e-12, reached)


def test_d2_garl_at_q_0_is_rao_blackwellised_rloo():
    model, M = random_model(seed=4), 3
    y = torch.cartesian_prod(*[torch.arange(3)] * M)  # every answer to every rollout
    r = (y == 0).double()
    rloo = (r - (r.sum(-1, keepdim=True) - r) / (M - 1)) / M  # the reward less the mean of the others
    z, log_w, _ = model.pools(M)
    for pool, a, b in zip(z, *garl_coefficients(log_w, 0.0)):
        probability = rloo * model.log_pyz[pool, y].sum(-1, keepdim=True).exp().detach()
        sampled = model.grad(surrogate_loss(model.log_pz[pool], model.log_pyz[pool, y], probability, probability))
        equal(model.estimate(pool, a, b), sampled)  # the mean over the answers, given the rationales


def test_d2_garl_at_q_1_is_the_gradient_of_the_iwae_bound_and_its_centred_weights_sum_to_0():
    model, M = random_model(seed=5, shift=2.0), 3
    z, log_w, _ = model.pools(M)
    a, b = garl_coefficients(log_w, 1.0)
    assert a.sum(-1).abs().max() < 1e-15
    equal(M * M * a, log_w.exp() / log_w.exp().mean(-1, keepdim=True) - 1)  # c_m = w_m / wbar - 1
    for pool, b_pool in zip(z, garl_coefficients(log_w, 1.0, baseline=False)[0]):
        ratio = model.log_pz[pool] + model.log_py[pool] - model.log_pz[pool].detach()  # p(z, y*) / proposal, the prior
        bound = ratio.logsumexp(-1) - math.log(M)
        equal(M * model.estimate(pool, b_pool, b_pool), model.grad(-bound))


def test_d2_paft_at_q_1_is_the_e_step_of_em():
    model, M = random_model(seed=6, shift=2.0), 3
    z, log_w, _ = model.pools(M)
    for pool, a, b, responsibility in zip(z, *paft(log_w, 1.0, M), log_w.softmax(-1)):
        equal(M * model.estimate(pool, a, b), model.estimate(pool, responsibility, responsibility))
    posterior = (model.log_pz + model.log_py - model.log_P).exp().detach()  # over all rationales: Fisher's identity
    equal(model.estimate(torch.arange(3), posterior, posterior), model.grad(tsallis_loss(model.log_P, 1.0)))


def test_d2_paft_at_q_0_is_posterior_sft_scaled_by_p():
    _, log_w, _ = random_model(seed=7, shift=2.0).pools(3)
    for K in (2, 3):
        n, _ = every_resample(log_w, K)
        for x in paft_coefficients(log_w.unsqueeze(-2).expand_as(n), 0.0, n):
            equal(x, log_w.exp().mean(-1).view(-1, 1, 1) * n / K)  # wbar times SFT's mean over the K drawn


@every_q
def test_eq_12_where_no_rollout_is_better_than_another_only_the_pathwise_term_is_left(q):
    for w in (1e-8, 0.1, 1.0):
        a, b = garl_coefficients(vector(w, w, w, w).log(), q)
        assert (a / b).abs().max() < 1e-14
        equal(4 * 4**q * b, vector(*[w ** (1 - q)] * 4))


def test_garl_at_q_1_with_0_1_weights_is_maxrl_s_coefficient():
    M = 5
    r = torch.cartesian_prod(*[vector(0, 1)] * M)[1:]  # but for no success at all
    a, _ = garl_coefficients(r.log().clamp(min=-1e4), 1.0)
    equal(M * M * a, (r - r.mean(-1, keepdim=True)) / r.mean(-1, keepdim=True))


# --- Section 7: the baseline, and the optimiser ----------------------------------------------------------------------
def test_grpo_s_expected_gradient_is_the_rl_gradient_times_the_expected_spread_of_the_rewards():
    # E = (M-1)/M E[std r] / (P (1-P)) grad l_0, over all pools of rationales *and* answers
    model, M = random_model(shift=1.0), 3
    pairs = torch.cartesian_prod(*[torch.arange(9)] * M)
    z, y = pairs // 3, pairs % 3
    reward = (y == 0).double()
    probability = (model.log_pz[z] + model.log_pyz[z, y]).sum(-1, keepdim=True).exp().detach()
    a, b = grpo_coefficients(reward)
    expected = model.grad(surrogate_loss(model.log_pz[z], model.log_pyz[z, y], probability * a, probability * b))
    spread = sum(p * statistics.stdev(r) for (p,), r in zip(probability.tolist(), reward.tolist()))
    P = model.log_P.exp()
    equal(expected, (M - 1) / M * spread / (P * (1 - P)) * model.grad(1 - P))


def grpo_factor(P, M):
    """GRPO's expected gradient over grad l_0: E[sum_m a_m r_m] / (P (1-P)), by the number of successes."""
    r = (torch.arange(M) < torch.arange(M + 1).unsqueeze(-1)).double()
    k = r.sum(-1)
    log_orders = math.lgamma(M + 1) - (k + 1).lgamma() - (M - k + 1).lgamma()
    probability = (log_orders + k * math.log(P) + (M - k) * math.log1p(-P)).exp()
    return (probability * (grpo_coefficients(r)[0] * r).sum(-1)).sum().item() / (P * (1 - P))


def test_grpo_amplifies_as_q_one_half_where_m_p_is_large_and_not_at_all_where_it_is_small():
    errors = [1 - grpo_factor(0.3, M) * math.sqrt(0.3 * 0.7) for M in (250, 500, 1000)]
    # towards (P (1-P))^-1/2, with an error that falls as 1/M and next as 1/M^2
    assert slope((250, 500, 1000), errors) == pytest.approx(-1, abs=0.01) and 0 < errors[-1] < 2e-3
    for M in (2, 8, 32):
        assert grpo_factor(1e-12, M) == pytest.approx((M - 1) / math.sqrt(M), rel=1e-9)


def first_step(config, gradient, **settings):
    """How far the first step moves a weight, in learning rates."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    optimizer = make_optimizer(model, config(lr=1e-3, **settings))
    model.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
    optimizer.step()
    return -model.weight.item() / 1e-3


def test_adam_divides_a_factor_of_the_gradient_out_while_above_epsilon_and_hardly_moves_below_it(config):
    # both moments start at 0: on the first step the bias corrections make them s g and (s g)^2
    eps, g = 1e-8, -0.7
    for s in (10.0**-k for k in range(0, 31, 2)):
        step = first_step(config, s * g, optimizer="adamw")
        assert step == pytest.approx(s * g / (s * abs(g) + eps), rel=1e-12)
        assert abs(abs(step) - 1) < 1e-3 if s > 1e-4 else s > 1e-12 or abs(step) < 1e-4
        assert first_step(config, s * g, optimizer="sgd") == pytest.approx(s * g, rel=1e-12)
    # s = P^(1-q) at log P = -39: q = 0 and 1/4 stand still, q = 1/2 takes a quarter of a step, larger q all of it
    moved = [first_step(config, math.exp((1 - q) * -39), optimizer="adamw") for q in QS]
    assert moved[0] < 1e-8 and moved[1] < 1e-4 and 0.2 < moved[2] < 0.3 and 0.999 < moved[3] < moved[4]
