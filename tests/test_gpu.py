"""For whoever has a card: python -m pytest -m gpu. Written without one, from the sources of torch, so it has never run.

Bounds are bfloat16's: a rounding is 2^-9, so values and gradients are held to 1e-2 of their norm; a wrong mask or head is
off by about 1.
"""
import json
import math
import subprocess
import sys

import pytest
import torch

import bench
import tsallis_rl
from data import Record
from data.models import attention
from tsallis_rl import (Config, Group, Rollout, chunked_log_probs, group_gradient, load_model, make_optimizer,
                        output_logits, resolve, respond, start_processes, vllm_runs_here)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPT, TOKENS, BYTES_A_PARAMETER, BYTES_A_TOKEN, LOGITS = 1024, 7168, 18, 2.41e6, 2e9  # README.md's rule


def distance(x, exact):
    """|x - exact| / |exact|."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def attended(device, dtype, T, S, mask):
    """Output of `attention` and its gradients for 2 rows, 16 query heads on 8 key heads of 128, as in Qwen3."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, T, 128), (2, 8, S, 128), (2, 8, S, 128))
    inputs = [torch.randn(*shape, generator=generator).bfloat16().to(device, dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(2, T, 16, 128, generator=generator).bfloat16().to(device, dtype)
    out, _ = attention(None, *inputs, mask, scaling=128**-0.5)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("T, S", ((300, 300), (300, 1000), (1, 700)))  # a prompt, responses after one, a single token
def test_flash_attention_is_the_explicit_mask_in_values_and_gradients(T, S):
    device = start_processes()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    query, key = (torch.empty(2, n, length, 128, device=device, dtype=torch.bfloat16) for n, length in ((16, T), (8, S)))
    params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, False, True)
    assert torch.backends.cuda.can_use_flash_attention(params, debug=True)
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    for flash, exact in zip(attended(device, torch.bfloat16, T, S, None), attended(device, torch.float32, T, S, mask)):
        assert distance(flash, exact) < 1e-2


def log_probs_of(device, dtype):
    """log p of 300 targets among Qwen3's vocabulary by `chunked_log_probs` from bfloat16 numbers, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 1024, generator=generator).bfloat16().to(device, dtype).requires_grad_()
    weight = (torch.randn(151936, 1024, generator=generator) / 8).bfloat16().to(device, dtype).requires_grad_()
    log_p = chunked_log_probs(hidden, weight, torch.arange(300, device=device))
    return [log_p, *torch.autograd.grad(log_p.sum(), (hidden, weight))], output_logits(hidden.detach(), weight.detach())


def test_logits_of_bfloat16_factors_are_not_rounded_and_their_log_probabilities_are_the_float32_ones():
    (half, logits), (whole, exact) = (log_probs_of(torch.device("cuda"), dtype) for dtype in (torch.bfloat16, torch.float32))
    # 1e-3: float32 sums over 1,024 products at magnitudes up to 24, where a bfloat16 logit is off by up to 0.06
    assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-3
    assert (half[0] - whole[0]).abs().max() < 1e-3
    assert max(distance(a, b) for a, b in zip(half[1:], whole[1:])) < 1e-2


@pytest.mark.parametrize("sampler", ("hf", "vllm"))
def test_three_training_steps_log_finite_numbers_and_a_sampler_gap_below_the_bound(sampler, tmp_path):
    if sampler == "vllm" and not vllm_runs_here()[0]:
        pytest.skip(vllm_runs_here()[1])
    arguments = ["--method", "garl", "--rollout", sampler, "--dtype", "bfloat16", "--gpu-share", "0.2", "--steps", "3",
                 "--eval-every", "3", "--eval-limit", "4", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, tsallis_rl.__file__, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    bound = resolve(Config(dtype="bfloat16")).gap_bound
    for row in rows[1:]:
        assert all(math.isfinite(row[name]) for name in ("loss", "log_P_mean", "grad_norm", "sampler_gap_max"))
        assert row["sampler_gap_mean"] < bound and row["skipped_in_a_row"] == 0 and row["grad_norm"] > 0
    print(sampler, "gap", [(row["sampler_gap_mean"], row["sampler_gap_max"]) for row in rows[1:]])


def group_of(model, fmt, M, length, prompt):
    """M rationales of that many random tokens after a prompt, with a gold answer."""
    words = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(10, model.config.vocab_size // 2, (n,), generator=words).tolist()
    z = [draw(length) for _ in range(M)]
    rollouts = [Rollout(ids, False, [], [0.0] * length) for ids in z]
    record = Record("0", "", "", "42")
    return Group(record, draw(prompt), rollouts, [respond(r, fmt.gold("42"), fmt) for r in rollouts], None, 0)


def one_step(model, fmt, config, length, prompt):
    """The gradient of one prompt and an update."""
    optimizer = make_optimizer(model, config)
    metrics = group_gradient(model, group_of(model, fmt, config.M, length, prompt), config)[2]
    optimizer.step()
    return metrics


@pytest.mark.parametrize("method", ("garl", "paft"))
def test_the_peak_memory_of_a_step_is_the_readme_s_rule(method, tmp_path):
    device = start_processes()
    model, fmt = load_model(bench.model_folder("qwen3-0.6b", str(tmp_path)), device)
    forced = len(fmt.forced(False) + fmt.gold("42"))
    config = resolve(Config(method=method, dtype="bfloat16", M=8, batch_size=1, token_budget=PROMPT + TOKENS))
    before = torch.cuda.memory_allocated() - 4 * model.num_parameters()
    torch.cuda.reset_peak_memory_stats()
    metrics = one_step(model, fmt, config, TOKENS // 8 - forced, PROMPT)
    peak = torch.cuda.max_memory_allocated() - before
    rule = BYTES_A_PARAMETER * model.num_parameters() + BYTES_A_TOKEN * config.token_budget + LOGITS
    print(f"{method}: peak {peak / 1e9:.1f} GB, rule {rule / 1e9:.1f} GB, tokens {metrics['trained_tokens']}")
    assert peak < 1.1 * rule  # and a rule that is far too large is as useless
    assert method == "paft" or peak > 0.6 * rule
