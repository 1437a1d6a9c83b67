"""The vLLM engine, for real: run wherever vLLM can run (a GPU, or its CPU build as in .ci/run), skipped elsewhere."""
import dataclasses

import pytest
import torch

import tsallis_rl
from test_log_probs import plain_log_probs
from test_processes import SMALL, difference, launch
from tsallis_rl import HFRollouts, LAB_MODEL, Response, RunError, VLLMRollouts, load_model, main, vllm_runs_here

pytestmark = pytest.mark.skipif(not vllm_runs_here()[0], reason=vllm_runs_here()[1])
THINK, ANSWER, M = 24, 8, 6
BOUND = 1e-4  # float32; measured 1e-6 to 3e-5


@pytest.fixture(scope="module")
def setup():
    """(engine, model, format, prompts): one engine for all tests of this file, in float32."""
    settings = tsallis_rl.resolve(tsallis_rl.Config(dtype="float32"))
    model, fmt = load_model(LAB_MODEL)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    engine = VLLMRollouts(LAB_MODEL, fmt, settings, 160)
    assert torch.equal(state, torch.get_rng_state()), "building the engine moved torch's random state"
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads, "building the engine took torch's threads"
    prompts = [fmt.prompt(r.warm_prompt) for r in tsallis_rl.load("ledger", "validation", 3)]
    engine.sync(model)
    return engine, model, fmt, prompts


def sample(setup, answer_budget=ANSWER, base=0, think_budget=THINK):
    engine, _, _, prompts = setup
    return engine.generate(prompts, [[base + 1000 * i + m for m in range(M)] for i in range(len(prompts))], think_budget, answer_budget)


def gap(setup, rollouts):
    """Largest |log p sampler - log p trainer| over all sampled tokens."""
    _, model, fmt, prompts = setup
    worst = 0.0
    for prompt, group in zip(prompts, rollouts):
        for r in group:
            response = Response.of(r, r.y, fmt)
            mask = torch.tensor(response.z_mask) | torch.tensor(response.y_mask)
            worst = max(worst, (plain_log_probs(model, prompt, response)[mask] - torch.tensor(r.log_p)).abs().max().item())
    return worst


def test_log_probabilities_are_the_trainer_s_and_rollouts_have_the_shape_of_the_other_engine_s(setup):
    rollouts, fmt = sample(setup), setup[2]
    assert gap(setup, rollouts) < BOUND
    for r in (r for group in rollouts for r in group):
        assert 1 <= len(r.z) <= THINK and 1 <= len(r.y) <= ANSWER and len(r.log_p) == len(r.z + r.y)
        assert r.closed == (r.z[-1] == fmt.close[0]) and (r.closed or r.z[-1] == fmt.end or len(r.z) == THINK)


def test_a_weight_change_reaches_the_sampler_only_through_sync_which_also_forgets_cached_prompts(setup):
    engine, model, _, _ = setup
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sample(setup)  # fills the prefix cache under the old weights
    with torch.no_grad():  # every tensor, so also the embedding that is tied to the output layer
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    assert gap(setup, sample(setup)) > 100 * BOUND  # stale weights are seen
    engine.sync(model)
    assert gap(setup, sample(setup)) < BOUND
    model.load_state_dict(before)
    engine.sync(model)
    assert gap(setup, sample(setup)) < BOUND


def test_a_spent_budget_forces_the_end_of_the_rationale(setup):
    for r in (r for group in sample(setup, think_budget=3) for r in group):
        assert len(r.z) == 3 and not r.closed and len(r.y) >= 1
    assert gap(setup, sample(setup, think_budget=3)) < BOUND  # the answer was conditioned on the forced tokens


def test_seeds_repeat_and_samples_of_a_prompt_differ(setup):
    one, two = sample(setup), sample(setup)
    assert [[(r.z, r.y) for r in g] for g in one] == [[(r.z, r.y) for r in g] for g in two]
    assert [[r.z for r in g] for g in sample(setup, base=500)] != [[r.z for r in g] for g in one]
    assert any(len({tuple(r.z) for r in group}) > 1 for group in one)
    thinking_only = sample(setup, answer_budget=0)
    assert [[r.z for r in g] for g in thinking_only] == [[r.z for r in g] for g in one]
    assert all(r.y == [] for g in thinking_only for r in g)


def test_both_engines_sample_the_same_distribution(setup, config):
    """Mean log-probability of the sampled rationales, an estimate of minus their entropy, agrees within its error."""
    engine, model, fmt, prompts = setup
    seeds = [[10**6 + 10**4 * i + m for m in range(128)] for i in range(len(prompts))]
    totals = []
    for sampler in (engine, HFRollouts(model, fmt, config())):
        groups = sampler.generate(prompts, seeds, THINK, 0)
        totals.append(torch.tensor([sum(r.log_p) for g in groups for r in g], dtype=torch.float64))
    error = (totals[0].var() / len(totals[0]) + totals[1].var() / len(totals[1])).sqrt()
    assert (totals[0].mean() - totals[1].mean()).abs() < 4 * error


def test_training_runs_with_it_and_reports_its_gap(tmp_path):
    small = ["--rollout", "vllm", "--dtype", "float32", "--M", "4", "--batch-size", "2", "--limit", "8", "--eval-samples", "4"]
    assert main([*small, "--method", "garl", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    import json
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(0 <= row["sampler_gap_max"] < 10 * BOUND for row in rows[1:])


def test_two_processes_with_fsdp_and_tensor_parallelism_equal_one(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = [*SMALL, "--rollout", "vllm", "--method", "garl", "--steps", "3"]  # the last --rollout counts
    launch(*settings, "--out", one, processes=1)
    launch(*settings, "--shard", "fsdp", "--tensor-parallel", "2", "--out", two)
    # 1e-5: as without vLLM; sampled tokens are the same unless a tie breaks otherwise, measured 1e-7
    assert difference(one, two) < 1e-5
