"""The whole program on the lab model: its steps, its numbers, its checkpoints, exact resuming; and it learns."""
import json
import math
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data.models
import tsallis_rl
from data import Record
from data.models import vllm_runs_here
from tsallis_rl import (FORCED, Group, HFRollouts, Response, Rollout, Run, batch_of, coefficients, encode, generate, main,
                        prompt_metrics, sample_answers, sample_groups, step_metrics, update)

CPU = torch.device("cpu")
SMALL = ["--rollout", "hf", "--M", "4", "--batch-size", "2", "--limit", "24", "--eval-every", "2", "--eval-samples", "4"]


def rows(run, name="metrics.jsonl"):
    """The rows of a log, without wall-clock times."""
    lines = [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines]


def weights(run, name="last"):
    return load_file(Path(run) / name / "model.safetensors")


def same(one, two):
    """Two runs are one: logs, and checkpoints bit for bit."""
    for log in ("metrics.jsonl", "samples.jsonl"):
        assert rows(one, log) == rows(two, log)
    for name in ("last", "best"):
        a, b = weights(one, name), weights(two, name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method, optimizer", (("garl", "adamw"), ("paft", "adamw"), ("paft", "sgd"), ("grpo", "adamw")))
def test_a_run_stopped_on_or_off_the_grid_of_validations_and_resumed_is_the_whole_run_bit_for_bit(method, optimizer, small, tmp_path):
    # GRPO on the lab model: a random one earns no reward
    start = [*(SMALL if method == "grpo" else small), "--eval-every", "2", "--method", method, "--optimizer", optimizer]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert main([*start, "--steps", "4", "--out", whole]) == 0
    assert main([*start, "--steps", "1", "--out", parts]) == 0
    assert {k for row in rows(parts)[1:] for k in row if k.startswith("val_")} == set(), "no validation off the grid"
    assert main(["--resume", parts, "--steps", "2"]) == 0
    assert main(["--resume", parts, "--steps", "3"]) == 0
    assert main(["--resume", parts, "--steps", "4"]) == 0
    same(whole, parts)
    assert [row["step"] for row in rows(whole)] == [0, 1, 2, 3, 4]


def scripted(monkeypatch, figures):
    """Validations whose maj@2 is, one after the other, what the script says."""
    figures = iter(figures)
    monkeypatch.setattr(tsallis_rl, "summarize", lambda *_: {"p@1": 0.0, "maj@2": next(figures)})


def step_of(run, name):
    return torch.load(Path(run) / name / "trainer.pt", weights_only=True)["step"]


@pytest.mark.parametrize("stop", (None, 1, 2, 3))
def test_best_is_the_earliest_of_the_highest_validations_also_across_a_resume(stop, small, tmp_path, monkeypatch):
    run, arguments = str(tmp_path / "run"), [*small, "--lr", "1e-2"]
    scripted(monkeypatch, [5.0, 10.0, 30.0, 30.0, 20.0])  # of steps 0 to 4
    if stop:
        assert main([*arguments, "--steps", str(stop), "--out", run]) == 0
    assert main([*(["--resume", run] if stop else [*arguments, "--out", run]), "--steps", "4"]) == 0
    assert step_of(run, "best") == 2 and step_of(run, "last") == 4
    best, last = weights(run, "best"), weights(run, "last")
    assert any(not torch.equal(best[k], last[k]) for k in best)


def test_the_last_step_of_a_run_is_saved_but_not_validated_off_the_grid_so_that_best_stays_what_it_would_be(small, tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    scripted(monkeypatch, [10.0, 20.0, 15.0])  # steps 0, 2 and 4: a validation at 3 would run out of script
    assert main([*small, "--eval-every", "2", "--steps", "3", "--out", run]) == 0
    assert step_of(run, "best") == 2 and step_of(run, "last") == 3
    assert main(["--resume", run, "--steps", "4"]) == 0
    assert step_of(run, "best") == 2 and [row["step"] for row in rows(run) if "val_maj@2" in row] == [0, 2, 4]


def test_a_run_is_one_folder_with_checkpoints_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    assert main([*SMALL, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "lock", "metrics.jsonl", "samples.jsonl", "best", "last"}
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["settings"]["think_budget"] and settings["versions"]["torch"] == torch.__version__
    for name in ("best", "last"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / name).eos_token == "<|im_end|>"
        assert sum(p.numel() for p in model.parameters()) > 1e6
    [best, other] = rows(tmp_path / "run", "samples.jsonl")
    assert best["log_w"] >= other["log_w"] and best["rationale"]


def test_every_epoch_is_a_permutation_of_its_own(config):
    settings = config(batch_size=5)
    epochs = [i for step in range(1, 5) for i, _ in batch_of(step, settings, 10)]
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(10)) and epochs[:10] != epochs[10:]
    assert epochs[:5] != [i for i, _ in batch_of(1, config(batch_size=5, seed=1), 10)]
    assert [epoch for step in (1, 2, 3) for _, epoch in batch_of(step, config(batch_size=3), 4)] == [0] * 4 + [1] * 4 + [2]


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(small, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*small, "--steps", "1", "--out", str(run)]) == 0
    before, limits = weights(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    # a limit on the size of a file stands in for the end of the disk: the model's write fails half way
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        assert main(["--resume", str(run), "--steps", "2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith("error: could not save") and error.count("\n") == 1 and f"--resume {run}" in error
    after = weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before) and not (run / "last.new").exists()
    assert main(["--resume", str(run), "--steps", "2"]) == 0


def test_a_checkpoint_cut_off_between_its_two_renames_is_found(small, tmp_path):
    assert main([*small, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "last").rename(tmp_path / "run" / "last.old")
    assert main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(tmp_path, monkeypatch, capsys):
    sample = HFRollouts.sample
    stale = lambda *args: [(ids, [x - 0.01 for x in log_p]) for ids, log_p in sample(*args)]

    run = str(tmp_path / "run")
    monkeypatch.setattr(HFRollouts, "sample", stale)
    assert main([*SMALL, "--steps", "2", "--out", run]) == 2
    error = capsys.readouterr().err
    assert "sampler and trainer disagree by 0.01 nats" in error and "there is no checkpoint yet" in error
    assert rows(run)[-1]["sampler_gap_mean"] == pytest.approx(0.01, rel=0.01)  # the evidence is logged
    monkeypatch.undo()
    assert main([*SMALL, "--steps", "2", "--out", run]) == 0  # so it may start over
    monkeypatch.setattr(HFRollouts, "sample", stale)
    assert main(["--resume", run, "--steps", "3"]) == 2
    assert f"the last good checkpoint is {run}/last" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["--resume", run, "--steps", "3"]) == 0
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]


@pytest.fixture
def make_run(lab, config, tmp_path):
    """A Run on the lab model (or another one) that was not started by the program: make_run(records, engine=..., **settings)."""
    def make(records, model=None, engine=None, **settings):
        settings = config(**{"rollout": "hf", "M": 4, "batch_size": 2, "eval_samples": 4} | settings)
        model, fmt = model or lab[0], lab[1]
        examples = encode(records, settings, fmt, 512)
        optimizer = tsallis_rl.make_optimizer(model, settings)
        return Run(settings, tmp_path, model, engine or HFRollouts(model, fmt, settings), optimizer, examples, examples)
    return make


def records(n):
    return [Record(str(i), f"What is {i}+3?", f"{i}+3", str(i + 3)) for i in range(n)]


def test_a_record_that_repeats_within_a_batch_is_another_draw(make_run):
    one, two = sample_groups(make_run(records(1)), 1)
    assert one.record == two.record and [r.z for r in one.rollouts] != [r.z for r in two.rollouts]


# --- Seeds ------------------------------------------------------------------------------------------------------------
class Scribe:
    """An engine that keeps the seeds it is given and answers "5" after an empty-handed rationale."""

    def __init__(self, fmt, answer=None):
        self.fmt, self.seeds, self.answer = fmt, [], answer or (lambda row: fmt.gold("5"))

    def sync(self, model):
        pass

    def sample(self, prompts, begun, seeds, budget, thinking, scored):
        self.seeds.append(list(seeds))
        sampled = [list(self.fmt.close) if thinking else self.answer(row) for row in range(len(seeds))]
        return [(ids, [-1.0] * len(ids) if scored else []) for ids in sampled]


def test_no_answer_has_the_noise_of_a_rationale_also_where_a_generator_keeps_32_bits(lab):
    engine = Scribe(lab[1])
    generate(engine, [[1, 2], [3, 4]], [2**40 + 7, 2**47 + 2**33 + 50], 3, 4, 4)
    rationales, answers = engine.seeds
    assert rationales == [2**40 + 7, 2**40 + 8, 2**40 + 9, *(2**47 + 2**33 + i for i in (50, 51, 52))]
    short = [seed % 2**32 for seed in rationales + answers]
    assert len(set(short)) == len(short) == 12
    for seed, other in zip(rationales, answers):  # nor are the streams the same, which is what counts
        one, two = (torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in (seed, other))
        assert not torch.equal(one, two)


class Recorder(torch.Generator):
    """A generator that notes what it is seeded with."""
    seeds = []

    def manual_seed(self, seed):
        Recorder.seeds.append(seed % 2**32)  # all that torch's CPU generator keeps
        return super().manual_seed(seed)


@pytest.mark.parametrize("method", ("garl", "paft", "grpo"))
def test_every_random_number_of_a_run_has_a_seed_of_its_own(method, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "Generator", Recorder)
    monkeypatch.setattr(Recorder, "seeds", [])
    assert main([*SMALL, "--limit", "3", "--method", method, "--steps", "3", "--eval-every", "4", "--out", str(tmp_path / "run")]) == 0
    step = 2 * 4 * (2 if method == "grpo" else 1) + 2 * (method == "paft")  # rationales, answers, resampling
    assert len(Recorder.seeds) == 3 * 4 * 2 + 4 * step  # step 0 too; validation at the start: 3 prompts, 4 samples
    assert len(set(Recorder.seeds)) == len(Recorder.seeds)


def test_the_resampling_is_independent_of_the_rationales_it_draws_from(make_run, random_model, monkeypatch):
    """With equal w every count of a prompt's rationales must be independent of their noise, or E[PAFT] is not E[GARL]."""
    uniforms, seen, real_draw, real_resample = [], [], data.models.draw, tsallis_rl.resample

    def draw(logits, uniform):
        uniforms.extend(uniform.tolist())
        return real_draw(logits, uniform)

    def resample(*args):
        counts = real_resample(*args)
        seen.append(counts[0].item())
        return counts

    monkeypatch.setattr(data.models, "draw", draw)
    monkeypatch.setattr(tsallis_rl, "resample", resample)
    run = make_run(records(50), model=random_model, method="paft", M=2, batch_size=50, think_budget=1)
    pairs = []  # (how often rationale 0 was drawn, the uniform numbers of both)
    for step in range(1, 9):
        uniforms.clear()
        groups = sample_groups(run, step)
        noise = {str(i): uniforms[2 * at:2 * at + 2] for at, (i, _) in enumerate(batch_of(step, run.config, 50))}
        for group in groups:
            coefficients(torch.full((2,), -5.0), group.seed, run.config)
            pairs.append((seen[-1], *noise[group.record.id]))
    n, one, two = torch.tensor(pairs, dtype=torch.float64).T
    assert len(n) == 400 and 0.4 < n.var() < 0.6  # binomial: K p (1 - p) = 1/2
    for u in (one, two, one - two):
        for x in (u, (u < 0.5).double()):
            correlation = torch.corrcoef(torch.stack([n, x]))[0, 1].item()
            assert abs(correlation) < 4 / 400**0.5  # four standard deviations; 0.5 and more where the noise is shared


def test_every_prompt_has_evaluation_seeds_of_its_own_and_the_same_ones_at_every_validation(make_run, lab):
    engine = Scribe(lab[1])
    run = make_run(records(5), engine=engine)
    for _ in range(2):
        assert sample_answers(engine, run.validation, run.config) == [["5"] * 4] * 5
    rationales, answers, again, _ = engine.seeds
    assert len(set(rationales)) == 5 * 4 and rationales == again
    run = make_run(records(5), engine=engine, seed=1)
    sample_answers(engine, run.validation, run.config)
    assert not set(engine.seeds[4]) & set(rationales), "and other ones for another seed of the run"
    run.validation[1] = (run.validation[1][0], [])  # too long: no answers, and the others keep their seeds
    assert sample_answers(engine, run.validation, run.config)[1] is None
    assert engine.seeds[6] == engine.seeds[4][:4] + engine.seeds[4][8:]


def test_no_two_steps_share_a_seed(make_run):
    run = make_run(records(3))
    seeds = [seed for step in range(1, 10) for group in sample_groups(run, step) for seed in range(group.seed, group.seed + 4)]
    assert len(set(seeds)) == 9 * 2 * 4
    assert {g.seed for g in sample_groups(make_run(records(3), seed=1), 1)}.isdisjoint(seeds)


# --- One step ---------------------------------------------------------------------------------------------------------
def test_the_reward_is_for_the_gold_answer_with_its_end_token_and_for_nothing_that_looks_like_it(make_run, lab):
    fmt = lab[1]
    [four], [two] = (fmt.tokenizer.encode(digit, add_special_tokens=False) for digit in "42")
    special = fmt.tokenizer.convert_tokens_to_ids("<|im_start|>")
    cases = [([four, two, fmt.end], 1), ([four, two], 0), ([four, special, two, fmt.end], 0), ([special, four, two, fmt.end], 0),
             ([four, two, special, fmt.end], 0), ([four, two, special], 0), ([four, *fmt.close, two, fmt.end], 0),
             ([four, fmt.end], 0), ([fmt.end], 0), ([two, four, fmt.end], 0), ([four, two, *fmt.seam, fmt.end], 1)]
    run = make_run([Record("0", "6*7?", "6*7", "42")], engine=Scribe(fmt, lambda row: cases[row][0]), method="grpo",
                   M=len(cases), batch_size=1)
    [group] = sample_groups(run, 1)
    assert group.reward.tolist() == [reward for _, reward in cases]
    assert [r.y for r in group.rollouts] == [ids for ids, _ in cases]
    assert all(r.ids[-len(ids):] == ids for r, (ids, _) in zip(group.responses, cases))


def test_the_metrics_of_a_prompt_are_the_written_out_ones(config, lab):
    w, q, M = [0.5, 0.1, 0.02, 0.3], 0.5, 4
    wbar = sum(w) / M
    c = [x / wbar**q - ((sum(w) - x) / (M - 1)) ** (1 - q) for x in w]
    rollouts = [Rollout([1] * n, closed, [2] * 2, []) for n, closed in ((3, True), (5, False), (2, True), (4, True))]
    responses = [Response([0] * n, [FORCED] * n) for n in (7, 9, 6, 8)]
    group = Group(Record("0", "", "", "5"), [1] * 11, rollouts, responses, None, 0)
    row = prompt_metrics(group, torch.tensor(w).log(), [0, 2, 3], torch.tensor([0.1, 0.3]), config(method="garl", q=q, M=M))
    near = lambda x: pytest.approx(x, rel=1e-6)
    assert row == {
        "loss": near((1 - wbar ** (1 - q)) / (1 - q)), "log_P_mean": near(math.log(wbar)), "log_P_min": near(math.log(wbar)),
        "ess": near(sum(w) ** 2 / sum(x * x for x in w)),
        "effective_reward_max": near(max(w) / wbar**q / M**q), "amplified_advantage_max": near(max(c) / M**q),
        "reward": None, "sampler_gap_mean": near(0.2), "sampler_gap_max": near(0.3),
        "rationale_tokens": 3.5, "forced_share": 0.25, "trained_share": 0.75, "sampled_tokens": 14 + 8, "trained_tokens": 11 + 21}
    row = prompt_metrics(group._replace(reward=torch.tensor([1.0, 0, 0, 0])), torch.tensor([1.0, 0, 0, 0]), [], torch.zeros(0),
                         config(method="grpo", M=M))
    assert row["reward"] == 0.25 and row["loss"] == 0.75 and row["trained_tokens"] == 11
    assert all(row[name] is None for name in ("log_P_mean", "ess", "effective_reward_max", "sampler_gap_mean", "sampler_gap_max"))


def test_metrics_of_a_step_are_means_but_for_names_in_max_and_min():
    rows = [{"loss": 1.0, "x_max": 1.0, "x_min": 1.0, "gap_max": None, "none": None, "maximum": 2.0},
            {"loss": 2.0, "x_max": 5.0, "x_min": -4.0, "gap_max": 0.5, "none": None, "maximum": 4.0},
            {"loss": 6.0, "x_max": 2.0, "x_min": 3.0, "gap_max": 0.25, "none": None, "maximum": 0.0}]
    assert step_metrics(rows) == {"loss": 3.0, "x_max": 5.0, "x_min": -4.0, "gap_max": 0.5, "none": None, "maximum": 2.0}


def stepped(monkeypatch, config, gradients, **settings):
    """Parameters before and after each update, norms and learning rates, when the gradients are these numbers."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    model = SimpleNamespace(parameters=lambda: [p])
    settings = config(**settings)
    run = SimpleNamespace(config=settings, model=model, optimizer=tsallis_rl.make_optimizer(model, settings))
    monkeypatch.setattr(tsallis_rl, "group_gradient", lambda model, gradient, _: setattr(p, "grad", torch.tensor(gradient)))
    history = []
    for step, gradient in enumerate(gradients, 1):
        before = p.detach().clone()
        _, row = update(run, [gradient], step)
        history.append(((p.detach() - before), row["grad_norm"], row["lr"], row["above_eps"]))
    return history


def test_the_step_is_the_clipped_gradient_times_a_rate_that_warms_up_linearly(monkeypatch, config):
    history = stepped(monkeypatch, config, [[3.0, 4.0]] * 6 + [[0.03, 0.04]], optimizer="sgd", lr=0.1, warmup=4, clip=0.5)
    assert [norm for _, norm, *_ in history] == pytest.approx([5.0] * 6 + [0.05])
    assert [lr for *_, lr, _ in history] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1])
    for change, norm, lr, _ in history:  # the direction, and the length min(norm, clip)
        assert change.tolist() == pytest.approx([-lr * min(norm, 0.5) * x for x in (0.6, 0.8)], rel=1e-4)
    assert stepped(monkeypatch, config, [[3.0, 4.0]], optimizer="sgd", lr=0.1, warmup=0)[0][2] == 0.1


def test_eps_is_adamw_s_and_above_eps_counts_the_clipped_gradients_above_it(monkeypatch, config):
    settings = dict(lr=0.1, warmup=0, clip=0.5, eps=0.4)
    [(change, *_, above)] = stepped(monkeypatch, config, [[3.0, 4.0]], **settings)  # clipped to 0.3 and 0.4 - 1e-7
    assert change.tolist() == pytest.approx([-0.1 * g / (g + 0.4) for g in (0.3, 0.4)], rel=1e-4) and above == 0
    assert stepped(monkeypatch, config, [[3.0, 4.0]], **settings | {"eps": 0.35})[0][3] == 0.5
    assert stepped(monkeypatch, config, [[3.0, 4.0]], **settings | {"eps": 0.25})[0][3] == 1
    assert stepped(monkeypatch, config, [[3.0, 4.0]], **settings, optimizer="sgd")[0][3] is None


def test_step_0_measures_the_start_and_moves_nothing(tmp_path):
    run = tmp_path / "run"
    assert main([*SMALL, "--method", "garl", "--steps", "0", "--out", str(run)]) == 0
    [row] = rows(run)
    assert row["step"] == row["lr"] == 0 and row["log_P_mean"] < 0 < row["above_eps"] and "val_maj@4" in row
    assert torch.load(run / "last" / "trainer.pt", weights_only=True)["optimizer"]["state"] == {}, "nor AdamW's moments"
    start = load_file(Path(tsallis_rl.LAB_MODEL) / "model.safetensors")
    assert all(torch.equal(w, start[name]) for name, w in weights(run).items())
    assert main(["--resume", str(run), "--steps", "1"]) == 0
    assert main([*SMALL, "--method", "garl", "--steps", "1", "--out", str(tmp_path / "whole")]) == 0
    same(run, tmp_path / "whole")


def test_a_schedule_moves_q_from_its_start_to_its_end_and_stays_there(tmp_path, config):
    settings = config(q=0.9, q_end=0.1, q_steps=4)
    assert [tsallis_rl.q_of(step, settings) for step in range(7)] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1, 0.1])
    assert {tsallis_rl.q_of(step, config(q=0.3)) for step in range(99)} == {0.3}
    arguments = [*SMALL, "--method", "garl", "--q", "1", "--q-end", "0", "--q-steps", "2", "--steps", "3"]
    assert main([*arguments, "--batch-size", "1", "--out", str(tmp_path / "run")]) == 0
    log = rows(tmp_path / "run")
    assert [row["q"] for row in log] == [1, 0.5, 0, 0]
    assert [row["loss"] for row in log] == pytest.approx(  # of one prompt: the loss is l_q at its P
        [tsallis_rl.tsallis_loss(row["log_P_mean"], row["q"]).item() for row in log])


def test_the_score_term_alone_is_garl_without_its_pathwise_term(config):
    log_w = torch.tensor([0.5, 0.1, 0.02, 0.3]).log()
    a, b = coefficients(log_w, 0, config(method="garl-score", q=0.5, M=4))
    whole, path = coefficients(log_w, 0, config(method="garl", q=0.5, M=4))
    assert torch.equal(a, whole) and not b.any() and path.all()


@pytest.mark.parametrize("optimizer", ("adamw", "sgd"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_gradient_that_is_not_finite_moves_nothing_not_even_the_optimiser_s_state(bad, optimizer, monkeypatch, config):
    settings = dict(optimizer=optimizer, lr=0.1, warmup=0)
    history = stepped(monkeypatch, config, [[3.0, 4.0], [bad, 1.0], [1.0, 1.0]], **settings)
    plain = stepped(monkeypatch, config, [[3.0, 4.0], [1.0, 1.0]], **settings)
    assert not history[1][0].any() and not math.isfinite(history[1][1])
    assert torch.equal(history[0][0], plain[0][0]) and torch.equal(history[2][0], plain[1][0])


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    real, calls = tsallis_rl.chunked_log_probs, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (1.0 if len(calls) <= 1 + 2 * 4 else float("nan"))  # the probe; 2 prompts a step, of 0, too

    monkeypatch.setattr(tsallis_rl, "chunked_log_probs", broken)
    run = tmp_path / "run"
    assert main([*SMALL, "--method", "garl", "--steps", "50", "--eval-every", "50", "--out", str(run)]) == 2
    assert "ten steps in a row" in capsys.readouterr().err
    assert [row["skipped_in_a_row"] for row in rows(run)[1:]] == [0, 0, 0, *range(1, 11)]
    assert all(w.isfinite().all() for w in weights(run).values())


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(small, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main([*small, "--steps", "1", "--out", run]) == 0
    before = rows(run)
    capsys.readouterr()
    for arguments, expected in ((["--out", run], "already holds"), (["--resume", run, "--q", "0.5"], "--q 0.75, not 0.5"),
                                (["--resume", run, "--limit", "7"], "--limit 4, not 7")):
        assert main([*arguments, "--steps", "2"]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert rows(run) == before


@pytest.mark.parametrize("arguments", (["--data", "finqa"], ["--model", "Qwen/Qwen3-0.6B"]))
def test_a_hub_out_of_reach_is_one_line_that_says_what_to_pass_instead(arguments, small, tmp_path, capsys):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert main([*small, *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert ("--data finqa:PATH" if arguments[0] == "--data" else "--model FOLDER") in error


@pytest.mark.skipif(vllm_runs_here()[0], reason="vLLM runs here")
def test_vllm_is_refused_where_it_cannot_run_and_auto_never_imports_it(tmp_path, capsys):
    assert main(["--rollout", "vllm", "--out", str(tmp_path / "run")]) == 2
    assert "--rollout vllm cannot run here" in capsys.readouterr().err
    assert main([*SMALL, "--rollout", "auto", "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "rollouts by transformers: " in capsys.readouterr().out and "vllm" not in sys.modules


def test_your_own_records_train(tmp_path):
    lines = (Path(tsallis_rl.LAB_MODEL).parent / "validation.jsonl").read_text().splitlines(True)
    (tmp_path / "mine.jsonl").write_text("".join(lines[:30]))
    budgets = ["--model", tsallis_rl.LAB_MODEL, "--think-budget", "24", "--answer-budget", "8"]
    assert main([*SMALL, "--data", str(tmp_path / "mine.jsonl"), *budgets, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    first, step = rows(tmp_path / "run")
    assert {"val_p@1", "val_p@4", "val_maj@4"} <= first.keys() and step["loss"] > 0


SHORT = ["--rollout", "hf", "--q", "0.75", "--M", "8", "--lr", "6e-4", "--steps", "15", "--eval-every", "15", "--eval-limit", "24"]


def test_a_short_warm_run_learns(tmp_path):
    run = tmp_path / "run"
    assert main([*SHORT, "--method", "paft", "--steps", "10", "--eval-every", "10", "--out", str(run)]) == 0
    first, last = rows(run)[0], rows(run)[-1]
    assert 10 <= first["val_p@1"] <= 30 and first["val_maj@16"] <= 35  # wrong rationales agree: voting does not help
    assert last["val_maj@16"] >= 50 and last["log_P_mean"] > rows(run)[1]["log_P_mean"]
    figure_3 = [row["effective_reward_max"] for row in rows(run)[1:]]
    assert all(0 <= x <= 1 + 1e-6 for x in figure_3)


def test_from_a_cold_start_grpo_has_no_gradient_and_garl_learns(tmp_path):
    cold = [*SHORT, "--start", "cold"]
    assert main([*cold, "--method", "grpo", "--steps", "3", "--out", str(tmp_path / "grpo")]) == 0
    assert main([*cold, "--method", "garl", "--out", str(tmp_path / "garl")]) == 0
    grpo, garl = rows(tmp_path / "grpo"), rows(tmp_path / "garl")
    assert all(row["grad_norm"] == 0 and row["reward"] == 0 for row in grpo[1:])
    metrics = ("val_p@1", "val_p@16", "val_maj@16")
    assert all(grpo[0][m] == garl[0][m] == 0 for m in metrics)
    assert garl[1]["log_P_mean"] < -8 and garl[-1]["val_p@1"] >= 20


def test_saving_leaves_the_optimiser_as_it_is(tmp_path):
    # asked for the state of an optimiser that has none, torch makes it by a step, and Adam's bias correction is off by one
    assert main([*SMALL, "--method", "garl", "--steps", "2", "--eval-every", "1", "--out", str(tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run" / "last" / "trainer.pt", weights_only=True)["optimizer"]["state"]
    assert len(state) == 46 and {float(s["step"]) for s in state.values()} == {2.0}
