"""The fast paths against plain ones: shared prompt, chunked vocabulary, cached rollouts. The plain ones live here."""
import dataclasses
import random
import re

import pytest
import torch

import tsallis_rl
from data import Record
from tsallis_rl import (Group, HFRollouts, Response, Rollout, chunked_log_probs, coefficients, group_gradient,
                        grpo_coefficients, surrogate_loss)

THINK, ANSWER, M = 12, 4, 6


def plain_log_probs(model, prompt, response):
    """log p of every response token from one forward over prompt and response, whole vocabulary, no cache: (T,)."""
    log_p = model(torch.tensor([prompt + response.ids])).logits[0].float().log_softmax(-1)
    return log_p[len(prompt) - 1:-1].gather(-1, torch.tensor(response.ids)[:, None])[:, 0]


@pytest.fixture
def pool(random_model, lab, config):
    """Rollouts of three prompts of different lengths; random models, so rationales of every length, some not closed."""
    rng, engine = random.Random(0), HFRollouts(random_model, lab[1], config())
    prompts = [[rng.randrange(6, 60) for _ in range(n)] for n in (9, 5, 14)]
    return prompts, engine.generate(prompts, [[100 * i + m for m in range(M)] for i in range(3)], THINK, ANSWER)


def group_of(method, prompt, rollouts, fmt):
    """A group as `sample_groups` lays it out."""
    if method == "grpo":
        responses = [Response.of(r, r.y, fmt) for r in rollouts]
        reward = torch.tensor([1.0, 0, 0, 1, 0, 0])
    else:
        rollouts = [Rollout(r.z, r.closed, [], r.log_p[:len(r.z)]) for r in rollouts]
        responses, reward = [Response.of(r, fmt.gold("27"), fmt) for r in rollouts], None
    return Group(0, Record("0", "", "", "27"), prompt, rollouts, responses, reward, seed=5)


def test_the_sampler_s_log_probabilities_are_the_trainer_s(pool, random_model, lab):
    for prompt, rollouts in zip(*pool):
        for r in rollouts:
            response = Response.of(r, r.y, lab[1])
            mask = torch.tensor(response.z_mask) | torch.tensor(response.y_mask)
            # 1e-4: float32, other order of summation (cache, padding)
            torch.testing.assert_close(plain_log_probs(random_model, prompt, response)[mask], torch.tensor(r.log_p), rtol=0, atol=1e-4)


def test_a_sample_does_not_depend_on_what_shares_its_batch(pool, random_model, lab, config):
    prompts, rollouts = pool
    alone = HFRollouts(random_model, lab[1], config(token_budget=1))
    for i, prompt in enumerate(prompts):
        [again] = alone.generate([prompt], [[100 * i + m for m in range(M)]], THINK, ANSWER)
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
    again = engine.generate(prompts, [[100 * i + m for m in range(M)] for i in range(3)], THINK, 0)
    assert [[r.z for r in g] for g in again] == [[r.z for r in g] for g in rollouts]
    assert all(r.y == [] and len(r.log_p) == len(r.z) for g in again for r in g)


@pytest.mark.parametrize("method", ("garl", "paft", "grpo"))
def test_the_shared_prompt_gradient_is_the_plain_one_for_every_token_budget(method, pool, random_model, lab, config):
    for prompt, rollouts in zip(*pool):
        group = group_of(method, prompt, rollouts, lab[1])
        log_p = [plain_log_probs(random_model, prompt, r) for r in group.responses]
        log_pz = torch.stack([x[torch.tensor(r.z_mask)].sum() for x, r in zip(log_p, group.responses)])
        log_py = torch.stack([x[torch.tensor(r.y_mask)].sum() for x, r in zip(log_p, group.responses)])
        settings = config(method=method, q=0.5, M=M)
        a, b = grpo_coefficients(group.reward) if method == "grpo" else coefficients(log_py.detach(), group.seed, settings)
        plain = torch.autograd.grad(surrogate_loss(log_pz, log_py, a, b) / 3, list(random_model.parameters()))
        for budget in (32768, 60, 1):
            random_model.zero_grad()
            result = group_gradient(random_model, group, dataclasses.replace(settings, token_budget=budget), 1 / 3)
            difference = sum((p.grad - g).square().sum() for p, g in zip(random_model.parameters(), plain)).sqrt()
            # 1e-5: float32 round-off over some hundred tokens; measured 5e-7 to 3e-6
            assert difference <= 1e-5 * sum(g.square().sum() for g in plain).sqrt(), (budget, difference)
            assert result.gap_max < 1e-4
            if method != "grpo":
                torch.testing.assert_close(result.log_w, log_py.detach(), rtol=0, atol=1e-4)


def test_what_has_no_weight_is_not_trained(pool, random_model, lab, config):
    prompt, rollouts = pool[0][0], pool[1][0]
    silent = dataclasses.replace(group_of("grpo", prompt, rollouts, lab[1]), reward=torch.zeros(M))
    random_model.zero_grad()
    result = group_gradient(random_model, silent, config(method="grpo", M=M), 1.0)
    assert result.trained == result.trained_tokens == result.gap_tokens == 0
    assert all(p.grad is None for p in random_model.parameters())
    group = group_of("paft", prompt, rollouts, lab[1])
    result = group_gradient(random_model, group, config(method="paft", M=M, K=1), 1.0)
    assert result.trained == 1 and (result.a != 0).sum() == 1


@pytest.mark.parametrize("chunk", (1, 64, 2**25))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_chunked_log_probabilities_are_the_naive_ones_in_value_and_gradient(chunk, dtype, monkeypatch):
    monkeypatch.setattr(tsallis_rl, "CHUNK", chunk)
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
    exact = group_gradient(random_model, group, config(method="garl", M=M), 1.0)
    half = group_gradient(random_model, group, config(method="garl", M=M, dtype="bfloat16"), 1.0)
    assert half.log_w.dtype == torch.float32
    assert (half.log_w - exact.log_w).abs().max() < 0.5  # bfloat16 has 8 bits; a wrong mask or position is off by nats


def test_the_log_prob_pass_takes_a_fraction_of_the_naive_memory(capsys):
    import bench  # a large vocabulary in fresh processes, whose peak memory can be told apart

    bench.log_probs([(2, True), (2, False)])
    out = capsys.readouterr().out
    naive, chunked = (float(x) for x in re.findall(r"peak ([\d.]+) GiB", out))
    # 1/8: measured 1/12 at 2,048 positions; the chunk is as large for any number of them
    assert 8 * chunked < naive
    assert all(float(x) < 1e-5 for x in re.findall(r"difference ([\d.e-]+)", out)) and out.count("difference") == 3
