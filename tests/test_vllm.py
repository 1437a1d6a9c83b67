"""The vLLM engine, for real: run wherever vLLM can run (a GPU, or its CPU build as in .ci/run), skipped elsewhere."""
import json

import pytest
import torch

import tsallis_rl
from test_log_probs import plain_log_probs
from test_processes import SMALL, difference, launch
from test_sequences import plain_format
from tsallis_rl import (CLOSE, FORCED, LAB_MODEL, Config, HFRollouts, VLLMRollouts, generate, load_model, main, resolve,
                        respond, vllm_runs_here)

pytestmark = pytest.mark.skipif(not vllm_runs_here()[0], reason=vllm_runs_here()[1])
CPU, THINK, ANSWER, M = torch.device("cpu"), 24, 8, 6
BOUND = 1e-4  # float32; measured 1e-6 to 3e-5


@pytest.fixture(scope="module")
def setup():
    """(engine, model, format, prompts): one engine for the lab model's tests, in float32."""
    model, fmt = load_model(LAB_MODEL, CPU)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    engine = VLLMRollouts(LAB_MODEL, fmt, resolve(Config(dtype="float32")), 160)
    assert torch.equal(state, torch.get_rng_state()), "building the engine moved torch's random state"
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads, "building the engine took torch's threads"
    engine.sync(model)
    return engine, model, fmt, [fmt.prompt(r.warm_prompt) for r in tsallis_rl.load("ledger", "validation", 3)]


def sample(setup, answer_budget=ANSWER, base=0, think_budget=THINK, scored=True):
    engine, _, _, prompts = setup
    seeds = [base + 1000 * i for i in range(len(prompts))]
    return generate(engine, prompts, seeds, M, think_budget, answer_budget, scored)


def ids(rollouts):
    return [[(r.z, r.y) for r in group] for group in rollouts]


def gap(setup, rollouts):
    """Largest |log p sampler - log p trainer| over all sampled tokens."""
    _, model, fmt, prompts = setup
    worst = 0.0
    for prompt, group in zip(prompts, rollouts):
        for r in group:
            response = respond(r, r.y, fmt)
            log_p = plain_log_probs(model, prompt, response)[torch.tensor(response.kinds) != FORCED]
            worst = max(worst, (log_p - torch.tensor(r.log_p)).abs().max().item())
    return worst


def test_log_probabilities_are_the_trainer_s_and_rollouts_have_the_shape_of_the_other_engine_s(setup):
    rollouts, fmt = sample(setup), setup[2]
    assert gap(setup, rollouts) < BOUND
    for r in (r for group in rollouts for r in group):
        assert 1 <= len(r.z) <= THINK and 1 <= len(r.y) <= ANSWER and len(r.log_p) == len(r.z + r.y)
        assert r.closed == (r.z[-1] == fmt.close[0]) and (r.closed or r.z[-1] == fmt.end or len(r.z) == THINK)


def test_without_scores_there_are_no_log_probabilities_and_the_samples_are_the_same(setup):
    unscored = sample(setup, scored=False)
    assert all(r.log_p == [] for group in unscored for r in group)
    assert ids(unscored) == ids(sample(setup))


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
    rollouts = sample(setup, think_budget=3)
    for r in (r for group in rollouts for r in group):
        assert len(r.z) == 3 and not r.closed and len(r.y) >= 1
    assert gap(setup, rollouts) < BOUND  # the answer was conditioned on the forced tokens


def test_seeds_repeat_and_samples_of_a_prompt_differ(setup):
    one = sample(setup)
    assert ids(one) == ids(sample(setup))
    assert [[r.z for r in g] for g in sample(setup, base=500)] != [[r.z for r in g] for g in one]
    assert any(len({tuple(r.z) for r in group}) > 1 for group in one)
    thinking_only = sample(setup, answer_budget=0)
    assert [[r.z for r in g] for g in thinking_only] == [[r.z for r in g] for g in one]
    assert all(r.y == [] for g in thinking_only for r in g)


def test_an_answer_does_not_replay_the_noise_of_its_rationale(setup):
    """Under one distribution for every token the ids are the noise: with weights of 0 an answer that had its rationale's
    seed, or one that torch's CPU generator takes for it, would repeat its first tokens."""
    engine, model, _, _ = setup
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    engine.sync(model)
    some = [r for group in sample(setup) for r in group]
    one, same, other = (engine.sample([prompt], [[]], [seed], 6, False, False) for prompt, seed in (([5], 7), ([9], 7), ([9], 8)))
    model.load_state_dict(before)
    engine.sync(model)
    assert one == same != other  # the noise is the seed's alone
    replays = sum(a == b for r in some for a, b in zip(r.z, r.y)) / sum(min(len(r.z), len(r.y)) for r in some)
    assert replays < 0.3  # by chance 1 in the size of the vocabulary; 1 with the rationale's own seed


def test_evaluation_samples_the_same_answers_again(setup):
    engine, _, _, prompts = setup
    examples = [(None, prompts[0]), (None, []), (None, prompts[1])]
    config = resolve(Config(dtype="float32", eval_samples=4))
    one = tsallis_rl.sample_answers(engine, examples, config)
    sample(setup)  # something else in between
    assert one == tsallis_rl.sample_answers(engine, examples, config)
    assert one[1] is None and len(one[0]) == len(one[2]) == 4


def test_both_engines_sample_the_same_distribution(setup):
    """Mean log-probability of the sampled rationales, an estimate of minus their entropy, agrees within its error."""
    engine, model, fmt, prompts = setup
    totals = []
    for sampler in (engine, HFRollouts(model, fmt, resolve(Config(dtype="float32")))):
        groups = generate(sampler, prompts, [10**6 + 10**4 * i for i in range(len(prompts))], 128, THINK, 0)
        totals.append(torch.tensor([sum(r.log_p) for g in groups for r in g], dtype=torch.float64))
    error = (totals[0].var() / len(totals[0]) + totals[1].var() / len(totals[1])).sqrt()
    assert (totals[0].mean() - totals[1].mean()).abs() < 4 * error


@pytest.mark.parametrize("tied", (True, False))
def test_a_delimiter_that_is_no_token_ends_the_rationale_as_text_and_ids_stay_as_sampled(tied, tmp_path):
    """A byte-level tokenizer without </think>, and a model that knows little else: it spells it in several ways."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fmt = plain_format()
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fmt.tokenizer), tie_word_embeddings=tied, head_dim=32, eos_token_id=fmt.end,
                                 max_position_embeddings=256, **shape)).save_pretrained(tmp_path)
    fmt.tokenizer.save_pretrained(tmp_path)
    model, fmt = load_model(str(tmp_path), CPU)
    engine = VLLMRollouts(str(tmp_path), fmt, resolve(Config(dtype="float32")), 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    spellings = [fmt.close, [i for c in CLOSE for i in fmt.tokenizer.encode(c, add_special_tokens=False)]]
    texts = [fmt.tokenizer.encode(f"so think {n}", add_special_tokens=False) + close for n in range(4) for close in spellings]
    for _ in range(60):
        for text in texts:
            model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.sync(model)
    prompts = [fmt.tokenizer.encode(f"so think {n}", add_special_tokens=False)[:3] for n in range(3)]
    setup = engine, model, fmt, prompts
    assert ids(sample(setup)) == ids(sample(setup, scored=False))
    for budget in (THINK, 2):
        rollouts = sample(setup, think_budget=budget)
        some = [r for group in rollouts for r in group]
        assert gap(setup, rollouts) < BOUND
        for r in some:
            text = fmt.tokenizer.decode(r.z)
            assert r.closed == (CLOSE in text) and (r.closed or r.z[-1] == fmt.end or len(r.z) == budget)
            assert CLOSE not in fmt.tokenizer.decode(r.z[:-1]) and 1 <= len(r.y) <= ANSWER  # it stopped at once
        assert any(r.closed == (budget == THINK) for r in some)
        if budget == THINK:
            # ids that encoding their text again would change
            again = [fmt.tokenizer.encode(fmt.tokenizer.decode(r.z), add_special_tokens=False) for r in some]
            assert any(r.closed and z != r.z for r, z in zip(some, again))


def test_training_runs_with_it_and_reports_its_gap(tmp_path):
    small = ["--rollout", "vllm", "--dtype", "float32", "--M", "4", "--batch-size", "2", "--limit", "8", "--eval-samples", "4"]
    assert main([*small, "--method", "grpo", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["sampler_gap_max"] for row in rows[1:]]
    assert len(rows) == 4 and all(gap is None or 0 <= gap < 10 * BOUND for gap in gaps)  # null where all rewards agreed


def test_two_processes_with_an_engine_each_equal_one(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = [*SMALL, "--rollout", "vllm", "--method", "garl", "--steps", "3"]  # the last --rollout counts
    launch(*settings, "--out", one, processes=1)
    launch(*settings, "--out", two)
    # 1e-5: as without vLLM; sampled tokens are the same unless a tie breaks otherwise, measured 1e-7
    assert difference(one, two) < 1e-5
