"""The fast paths against plain ones: shared prompt, chunks of the vocabulary, sampler."""
import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import error, group_of, plain_gradient
from torch.nn.attention.bias import causal_lower_right

import tsallis_rl
from data.files import UserError
from tsallis_rl import (HFRollouts, Rollout, SharedPrompt, Template, attention, draw, generate,
                        group_gradient, micro_batches, token_log_probs)

THINK, ANSWER, M = 12, 4, 6


@pytest.fixture
def pool(random_model, lab, config):
    """Rollouts of three prompts of different lengths. Some are closed, some are not."""
    rng, engine = random.Random(0), HFRollouts(random_model, lab[1], config())
    prompts = [[rng.randrange(6, 60) for _ in range(n)] for n in (9, 5, 14)]
    return prompts, generate(engine, prompts, [0, 100, 200], M, THINK, ANSWER)


def test_sampler(random_model, lab, config):
    """The sampler draws by the model's distribution and the row's own random numbers, whatever
    shares its batch, with prompts and responses of unequal lengths."""
    begins = ((3, []), (9, [20, 21, 22]), (9, []), (5, [23]))
    asked = [([*range(6, 6 + n)], begun, n) for n, begun in begins]
    for budget in (8192, 20):  # one batch, or one for each row
        engine = HFRollouts(random_model, lab[1], config(token_budget=budget))
        samples = engine.sample(asked, 10, lab[1].stop)
        for (prompt, begun, seed), (ids, log_p) in zip(asked, samples):
            logits = random_model(torch.tensor([prompt + begun + ids])).logits[0]
            uniform = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            token, plain = draw(logits[-len(ids) - 1:-1], uniform[:len(ids)])
            assert token.tolist() == ids
            torch.testing.assert_close(torch.tensor(log_p), plain, rtol=0, atol=1e-4)


def test_budgets(random_model, lab, config):
    """Samples keep to their budgets, and nothing follows a token that ends them."""
    template = Template(lab[1].tokenizer, range(20))  # a model may name many end tokens
    engine = HFRollouts(random_model, template, config())
    [rollouts] = generate(engine, [[7, 30]], [1], 50, THINK, ANSWER)
    assert {len(r.z) == THINK for r in rollouts} == {True, False}  # both ends occur
    for r in rollouts:
        assert 1 <= len(r.z) <= THINK and 1 <= len(r.y) <= ANSWER and len(r.log_p) == len(r.z)
        assert not template.stop & set(r.z[:-1]) and not template.ends & set(r.y[:-1])
        assert r.z[-1] in template.stop or len(r.z) == THINK
        assert r.y[-1] in template.ends or len(r.y) == ANSWER


@pytest.mark.parametrize("method", ("garl", "garl-score", "paft", "grpo"))
def test_gradient(method, pool, random_model, lab, config):
    """The gradient is the plain one over B, for every token budget and length."""
    for prompt, rollouts in zip(*pool):
        group = group_of(lab[1], prompt, rollouts, method)
        settings = config(method=method, q=0.5, M=M, K=3, batch_size=3)
        plain_w, plain = plain_gradient(random_model, group, settings)
        for budget in (32768, 60, 1):
            random_model.zero_grad()
            changed = dataclasses.replace(settings, token_budget=budget)
            log_w, metrics = group_gradient(random_model, group, changed)
            # float32 round-off over some hundred tokens; measured 1e-6
            assert error(random_model, plain) < 1e-5 and metrics["sampler_gap"] < 1e-4
            if method != "grpo":
                torch.testing.assert_close(log_w.float(), plain_w, rtol=0, atol=1e-4)


def test_gradient_of_equal_rationales(pool, random_model, lab, config):
    """Where all rationales agree, a is 0 and b is not: the pathwise term remains."""
    group = group_of(lab[1], pool[0][0], [pool[1][0][0]] * 2, gold="2")
    settings = config(method="garl", q=0.0, M=2)
    log_w, _ = group_gradient(random_model, group, settings)
    assert not tsallis_rl.coefficients(log_w, group, settings)[0].any()
    assert error(random_model, plain_gradient(random_model, group, settings)[1]) < 1e-5


@pytest.mark.parametrize("budget", (32768, 60))
def test_bfloat16(budget, pool, random_model, lab, config):
    """Sampler and trainer compute in bfloat16. Each parameter gets its gradient, in its digits."""
    group, seen = group_of(lab[1], pool[0][0], pool[1][0]), set()
    settings = config(method="garl", q=0.5, M=M, batch_size=3, token_budget=budget)
    plain_w, plain = plain_gradient(random_model, group, settings)
    settings = dataclasses.replace(settings, dtype="bfloat16")
    layer = random_model.base_model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda _, inputs, out: seen.add(out.dtype))
    generate(HFRollouts(random_model, lab[1], settings), pool[0], [0, 1, 2], 2, 4, 2)
    log_w, _ = group_gradient(random_model, group, settings)
    assert seen == {torch.bfloat16}
    assert (log_w - plain_w).abs().max() < 0.5  # a wrong mask or position is off by nats
    assert error(random_model, plain) < 0.1
    for p, g in zip(random_model.parameters(), plain):
        assert p.dtype == torch.float32 and (p.grad - g).norm() < 0.3 * g.norm()


def test_untrained(pool, random_model, lab, config):
    """What has no coefficient is not trained; a model that is not finite stops the run."""
    prompt, rollouts = pool[0][0], pool[1][0]
    silent = group_of(lab[1], prompt, rollouts, "grpo")._replace(reward=torch.zeros(M))
    _, metrics = group_gradient(random_model, silent, config(method="grpo", M=M))
    assert metrics["trained"] == 0 and "sampler_gap" not in metrics
    assert all(p.grad is None for p in random_model.parameters())
    group = group_of(lab[1], prompt, rollouts, "paft")
    assert group_gradient(random_model, group, config(M=M, K=1))[1]["trained"] == 1 / M
    with torch.no_grad():
        random_model.get_output_embeddings().weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        group_gradient(random_model, group, config(M=M))


def test_micro_batches(random_model, lab, config):
    """Each row is in one batch, and a batch keeps its budget of trained tokens. A row's copy of
    the prompt's keys and values counts as a 20th of the prompt."""
    rollouts = [Rollout([7] * n, [], [8], [9]) for n in (3, 30, 7, 12, 1)]
    group, sizes = group_of(lab[1], list(range(6, 406)), rollouts, "grpo"), set()
    for budget in (32768, 1000, 600, 500, 1):
        shared = SharedPrompt(random_model, group.prompt, config(token_budget=budget))
        batches = micro_batches(shared, group, range(5))
        assert sorted(m for batch in batches for m in batch) == list(range(5))
        for batch in batches:
            longest = max(len(group.rollouts[m].ids) for m in batch)
            assert len(batch) == 1 or 400 + len(batch) * (longest + 20) <= budget
        sizes.add(len(batches))
    assert {1, 5} < sizes


def agree(ours, theirs, inputs):
    """Both have the same values, and the same gradients for the same upstream ones."""
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs)]
    for x, y in ((ours, theirs), *zip(*grads)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk", (1, 64, 2**25))
def test_token_log_probs(chunk, monkeypatch):
    """Chunked log-probabilities are torch's, in value and gradient."""
    monkeypatch.setitem(tsallis_rl.CHUNK, "cpu", chunk)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g).double().requires_grad_() for n in (13, 37))
    target = torch.randint(37, (13,), generator=g)
    plain = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    agree(token_log_probs(hidden, weight, target), plain, (hidden, weight))


@pytest.mark.parametrize("T, S", ((1, 9), (3, 9), (9, 9)))
@pytest.mark.parametrize("masked", (False, True))
def test_attention(T, S, masked):
    """The attention is torch's causal one, or the one with a mask for padding on the left."""
    R, H, G, D, g = 2, 6, 3, 8, torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(R, heads, length, D, generator=g).double().requires_grad_()
                         for heads, length in ((H, T), (G, S), (G, S)))
    bias, mask = causal_lower_right(T, S), None
    if masked:
        mask = bias = torch.ones(R, 1, T, S, dtype=torch.bool).tril(S - T)
        mask[1, :, :, :(S - T) // 2] = False
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3,
                                            enable_gqa=True).transpose(1, 2)
    ours, _ = attention(None, query, key, value, mask, scaling=0.3)
    agree(ours, theirs, (query, key, value))


def test_draw():
    """A token is drawn where the distribution function passes the uniform number."""
    p = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3], dtype=torch.float64)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1] + 0.0005  # each once
    token, log_p = draw(p.log().expand(1000, 5), uniform)
    assert torch.bincount(token, minlength=5).tolist() == [100, 0, 400, 200, 300]
    torch.testing.assert_close(log_p, p.log()[token], rtol=0, atol=1e-12)
    edges = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)  # and not a number
    assert draw(torch.stack([p.log(), p.log(), p / 0 * 0]), edges)[0].tolist() == [0, 4, 4]
