"""The fast paths against plain ones: shared prompt, chunked vocabulary, cached rollouts. The plain ones live here."""
import dataclasses
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import tsallis_rl
from data import Record
from data.models import attention, draw
from tsallis_rl import (FORCED, Y, Z, Group, HFRollouts, Rollout, SharedPrompt, chunked_log_probs, coefficients,
                        generate, group_gradient, grpo_coefficients, micro_batches, respond, surrogate_loss)

THINK, ANSWER, M = 12, 4, 6


def at(response, *kinds):
    """Which tokens of a response are of these kinds: (T,)."""
    return torch.tensor([kind in kinds for kind in response.kinds])


def plain_log_probs(model, prompt, response):
    """log p of every response token from one forward over prompt and response, whole vocabulary, no cache: (T,)."""
    log_p = model(torch.tensor([prompt + response.ids])).logits[0].float().log_softmax(-1)
    return log_p[len(prompt) - 1:-1].gather(-1, torch.tensor(response.ids)[:, None])[:, 0]


@pytest.fixture
def pool(random_model, lab, config):
    """Rollouts of three prompts of different lengths; random models, so rationales of every length, some not closed."""
    rng, engine = random.Random(0), HFRollouts(random_model, lab[1], config())
    prompts = [[rng.randrange(6, 60) for _ in range(n)] for n in (9, 5, 14)]
    return prompts, generate(engine, prompts, [0, 100, 200], M, THINK, ANSWER)


def group_of(method, prompt, rollouts, fmt):
    """A group as `sample_groups` lays it out."""
    if method == "grpo":
        responses = [respond(r, r.y, fmt) for r in rollouts]
        reward = torch.tensor([1.0, 0, 0, 1, 0, 0])
    else:
        rollouts = [Rollout(r.z, r.closed, [], r.log_p[:len(r.z)]) for r in rollouts]
        responses, reward = [respond(r, fmt.gold("27"), fmt) for r in rollouts], None
    return Group(Record("0", "", "", "27"), prompt, rollouts, responses, reward, seed=5)


def test_the_sampler_s_log_probabilities_are_the_trainer_s(pool, random_model, lab):
    for prompt, rollouts in zip(*pool):
        for r in rollouts:
            response = respond(r, r.y, lab[1])
            log_p = plain_log_probs(random_model, prompt, response)[at(response, Z, Y)]
            # 1e-4: float32, other order of summation (cache, padding)
            torch.testing.assert_close(log_p, torch.tensor(r.log_p), rtol=0, atol=1e-4)


def test_a_sample_does_not_depend_on_what_shares_its_batch(pool, random_model, lab, config):
    prompts, rollouts = pool
    alone = HFRollouts(random_model, lab[1], config(token_budget=1))
    for i, prompt in enumerate(prompts):
        [again] = generate(alone, [prompt], [100 * i], M, THINK, ANSWER)
        assert [(r.z, r.y) for r in again] == [(r.z, r.y) for r in rollouts[i]]


def test_budgets_are_kept_and_what_is_forced_is_not_recorded_as_sampled(pool, lab):
    rollouts = [r for group in pool[1] for r in group]
    fmt = lab[1]
    assert {len(r.z) == THINK for r in rollouts} == {True, False}  # both ways to end occur
    for r in rollouts:
        assert 1 <= len(r.z) <= THINK and 1 <= len(r.y) <= ANSWER and len(r.log_p) == len(r.z + r.y)
        assert r.closed == (r.z[-1] == fmt.close[0]) and fmt.close[0] not in r.z[:-1] and fmt.end not in r.z[:-1] + r.y[:-1]
        assert r.closed or r.z[-1] == fmt.end or len(r.z) == THINK


def test_without_an_answer_budget_only_the_rationale_is_sampled_and_it_is_the_same_one(pool, random_model, lab, config):
    prompts, rollouts = pool
    engine = HFRollouts(random_model, lab[1], config())
    again = generate(engine, prompts, [0, 100, 200], M, THINK, 0)
    assert [[r.z for r in g] for g in again] == [[r.z for r in g] for g in rollouts]
    assert all(r.y == [] and len(r.log_p) == len(r.z) for g in again for r in g)


def plain_gradient(model, group, settings):
    """(log w, gradient) of one prompt's surrogate loss from plain log-probabilities, not divided by B."""
    log_p = [plain_log_probs(model, group.prompt, r) for r in group.responses]
    log_pz, log_py = (torch.stack([x[at(r, kind)].sum() for x, r in zip(log_p, group.responses)]) for kind in (Z, Y))
    if settings.method == "grpo":
        a, b = grpo_coefficients(group.reward)
    else:
        a, b = coefficients(log_py.detach(), group.seed, settings)
    return log_py.detach(), torch.autograd.grad(surrogate_loss(log_pz, log_py, a, b), list(model.parameters()))


@pytest.mark.parametrize("method", ("garl", "paft", "grpo"))
def test_the_shared_prompt_gradient_is_the_plain_one_over_B_for_every_token_budget(method, pool, random_model, lab, config):
    for prompt, rollouts in zip(*pool):
        group = group_of(method, prompt, rollouts, lab[1])
        settings = config(method=method, q=0.5, M=M, batch_size=3)
        log_w, plain = plain_gradient(random_model, group, settings)
        for budget in (32768, 60, 1):
            random_model.zero_grad()
            weight, _, metrics = group_gradient(random_model, group, dataclasses.replace(settings, token_budget=budget))
            difference = sum((p.grad - g / 3).square().sum() for p, g in zip(random_model.parameters(), plain)).sqrt()
            # 1e-5: float32 round-off over some hundred tokens; measured 5e-7 to 3e-6
            assert difference <= 1e-5 * sum((g / 3).square().sum() for g in plain).sqrt(), (budget, difference)
            assert metrics["sampler_gap_max"] < 1e-4
            if method != "grpo":
                torch.testing.assert_close(weight, log_w, rtol=0, atol=1e-4)


def test_micro_batches_hold_every_row_once_and_keep_the_budget_where_they_can(pool, lab):
    group = group_of("garl", pool[0][0], pool[1][0], lab[1])
    for budget in (32768, 100, 60, 30, 1):
        batches = micro_batches(group, range(M), budget)
        assert sorted(m for rows in batches for m in rows) == list(range(M))
        for rows in batches:
            padded = len(rows) * max(len(group.responses[m].ids) for m in rows)
            assert len(rows) == 1 or len(group.prompt) + padded <= budget
    assert len(micro_batches(group, range(M), 32768)) == 1 and len(micro_batches(group, range(M), 1)) == M
    assert micro_batches(group, [], 1) == []


def test_what_has_no_weight_is_not_trained(pool, random_model, lab, config):
    prompt, rollouts = pool[0][0], pool[1][0]
    silent = group_of("grpo", prompt, rollouts, lab[1])._replace(reward=torch.zeros(M))
    random_model.zero_grad()
    _, a, metrics = group_gradient(random_model, silent, config(method="grpo", M=M))
    assert metrics["trained_share"] == 0 and metrics["trained_tokens"] == len(prompt) and not a.any()
    assert metrics["sampler_gap_mean"] is None
    assert all(p.grad is None for p in random_model.parameters())
    group = group_of("paft", prompt, rollouts, lab[1])
    _, a, metrics = group_gradient(random_model, group, config(method="paft", M=M, K=1))
    assert metrics["trained_share"] == 1 / M and (a != 0).sum() == 1
    [m] = a.nonzero()[0].tolist()
    assert metrics["trained_tokens"] == len(prompt) + len(group.responses[m].ids)
    once = group_gradient(random_model, group_of("garl", prompt, rollouts, lab[1]), config(method="garl", M=M))[2]
    assert metrics["sampler_gap_mean"] == pytest.approx(once["sampler_gap_mean"]), "a row that runs again counts once"


@pytest.mark.parametrize("method", ("garl", "paft"))
def test_weights_that_are_not_finite_give_a_gradient_that_is_not(method, pool, random_model, lab, config, monkeypatch):
    real = tsallis_rl.chunked_log_probs
    monkeypatch.setattr(tsallis_rl, "chunked_log_probs", lambda *args: real(*args) * float("nan"))
    random_model.zero_grad()
    group_gradient(random_model, group_of(method, pool[0][0], pool[1][0], lab[1]), config(method=method, M=M))
    assert not all(p.grad.isfinite().all() for p in random_model.parameters() if p.grad is not None)


@pytest.mark.parametrize("chunk", (1, 64, 2**25))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_chunked_log_probabilities_are_the_naive_ones_in_value_and_gradient(chunk, dtype, monkeypatch):
    monkeypatch.setitem(tsallis_rl.CHUNK, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=dtype).requires_grad_() for n in (13, 37))
    target, upstream = torch.randint(37, (13,), generator=generator), torch.randn(13, generator=generator, dtype=dtype)
    naive = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    fast = chunked_log_probs(hidden, weight, target)
    tolerance = dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    torch.testing.assert_close(fast, naive, **tolerance)
    for x, y in zip(*(torch.autograd.grad(out, (hidden, weight), upstream) for out in (fast, naive))):
        torch.testing.assert_close(x, y, **tolerance)


def test_under_autocast_log_probabilities_are_float32_and_near_the_float32_ones(random_model, pool, lab, config):
    prompt, rollouts = pool[0][0], pool[1][0]
    group = group_of("garl", prompt, rollouts, lab[1])
    exact, *_ = group_gradient(random_model, group, config(method="garl", M=M))
    half, *_ = group_gradient(random_model, group, config(method="garl", M=M, dtype="bfloat16"))
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.5  # bfloat16 has 8 bits; a wrong mask or position is off by nats


def test_under_autocast_every_budget_gives_every_parameter_its_gradient(random_model, pool, lab, config):
    # autocast keeps its bfloat16 copies of the weights: those of a pass without gradients would cut them off
    group = group_of("garl", pool[0][0], pool[1][0], lab[1])
    norms = []
    for budget in (32768, 60):
        random_model.zero_grad()
        group_gradient(random_model, group, config(method="garl", M=M, dtype="bfloat16", token_budget=budget))
        assert all(p.grad is not None and p.grad.any() for p in random_model.parameters())
        norms.append(sum(p.grad.square().sum() for p in random_model.parameters()).sqrt().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)  # bfloat16 sums in another order


@pytest.mark.parametrize("T, S", ((1, 1), (1, 9), (3, 9), (9, 9)))
@pytest.mark.parametrize("masked", (False, True))
def test_attention_is_torch_s_with_the_causal_bias_that_a_gpu_is_given(T, S, masked):
    R, H, G, D = 2, 6, 3, 8
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(R, heads, length, D, generator=generator, dtype=torch.float64).requires_grad_()
                         for heads, length in ((H, T), (G, S), (G, S)))
    bias, mask = causal_lower_right(T, S), None
    if masked:  # padding on the left of the second row, as rollouts have; what it sees itself must stay
        mask = torch.ones(R, 1, T, S, dtype=torch.bool).tril(S - T)
        mask[1, :, :, :(S - T) // 2] = False
        bias = mask
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3, enable_gqa=True).transpose(1, 2)
    ours, _ = attention(None, query, key, value, mask, scaling=0.3)
    assert ours.shape == (R, T, H, D) and ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for x, y in zip(*(torch.autograd.grad(out, (query, key, value), upstream) for out in (ours, theirs))):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_a_token_is_drawn_where_the_distribution_function_passes_the_uniform_number():
    p = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3], dtype=torch.float64)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1] + 0.0005  # every thousandth once
    token, log_p = draw(p.log().expand(1000, 5), uniform)
    assert torch.bincount(token, minlength=5).tolist() == [100, 0, 400, 200, 300]
    torch.testing.assert_close(log_p, p.log()[token], rtol=0, atol=1e-12)
    edges, _ = draw(p.log().expand(2, 5), torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert edges.tolist() == [0, 4]


def test_the_transformers_sampler_draws_from_the_model_s_distribution(random_model, lab, config):
    """Chi-square of the first token and of the whole rationale of two tokens against the model's own probabilities."""
    model, fmt = random_model, lab[1]
    prompt, n = [7, 30, 12, 45], 4000
    [rollouts] = generate(HFRollouts(model, fmt, config()), [prompt], [12345], n, 2, 0, scored=False)
    with torch.no_grad():
        one = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        two = model(torch.tensor([prompt + [i] for i in range(len(one))])).logits[:, -1].double().softmax(-1)
    joint = one[:, None] * two
    for i in (fmt.close[0], fmt.end):  # a rationale that ended has no second token
        joint[i] = F.one_hot(torch.tensor(0), len(one)) * one[i]
    counts = torch.zeros_like(joint)
    for r in rollouts:
        counts[r.z[0], r.z[1] if len(r.z) > 1 else 0] += 1
    for p, seen in ((one, counts.sum(-1)), (joint.flatten(), counts.flatten())):
        large = n * p >= 5  # the usual rule; the rest is one cell
        p, seen = (torch.cat([x[large], x[~large].sum()[None]]) for x in (p, seen))
        assert len(p) > 3
        degrees, chi_square = len(p) - 1, ((seen - n * p).square() / (n * p).clamp(min=1e-9)).sum().item()
        # mean `degrees`, variance twice that: five standard deviations; uniform**2 gives thousands
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_the_log_prob_pass_takes_a_fraction_of_the_naive_memory(capsys):
    import bench  # a large vocabulary in fresh processes, whose peak memory can be told apart

    bench.log_probs([(2, True), (2, False)])
    out = capsys.readouterr().out
    naive, chunked = (float(x) for x in re.findall(r"peak ([\d.]+) GiB", out))
    # 1/8: measured 1/12 at 2,048 positions; the chunk is as large for any number of them
    assert 8 * chunked < naive
    assert all(float(x) < 1e-5 for x in re.findall(r"difference ([\d.e-]+)", out)) and out.count("difference") == 3
