"""The program on small models: its steps, seeds, numbers and checkpoints; and it learns."""
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SMALL, equal, program, rows, same, step_of, weights

import tsallis_rl
from data import Record
from tsallis_rl import (Group, HFRollouts, Rollout, batch_of, coefficients, prompt_metrics,
                        sample_groups)


# --- Runs, checkpoints, --resume ----------------------------------------------------------
@pytest.mark.parametrize("method, optimizer", (
    ("garl", "adamw"), ("paft", "sgd"), ("grpo", "adamw")))
def test_resume(method, optimizer, small, tmp_path):
    """A run that stopped, at a validation or between two, is the whole run bit for bit."""
    start = SMALL if method == "grpo" else small  # a random model earns no reward
    start = [*start, "--eval-every", "2", "--method", method, "--optimizer", optimizer]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert program([*start, "--steps", "4", "--out", whole]) == 0
    assert program([*start, "--steps", "3", "--out", parts]) == 0
    assert program(["--resume", parts, "--steps", "4"]) == 0
    assert same(whole, parts) and [row["step"] for row in rows(whole)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop", ("0", "2"))
@pytest.mark.parametrize("script, best", (([5, 30, 20, 25], 1), ([5, 10, 10, 7], 1),
                                          ([0, 1, 2, 3], 3)))
def test_best(script, best, stop, small, tmp_path, monkeypatch):
    """best is the first of the highest validations, also when the run was resumed."""
    run, figures = str(tmp_path / "run"), iter(script)  # of steps 0 to 3
    monkeypatch.setattr(tsallis_rl, "summarize", lambda *_: {"maj@2": next(figures)})
    assert program([*small, "--steps", stop, "--out", run]) == 0
    assert program(["--resume", run, "--steps", "3"]) == 0
    assert step_of(run, "best") == best and step_of(run, "last") == 3


def test_folder(tmp_path):
    """A run is one folder with whole checkpoints. Step 0 only validates, the last one as well."""
    run = tmp_path / "run"
    assert program([*SMALL, "--steps", "2", "--method", "garl", "--eps", "1e-6",
                    "--eval-every", "40", "--out", str(run)]) == 0
    assert {p.name for p in run.iterdir()} == {"config.json", "lock", "metrics.jsonl",
                                               "samples.jsonl", "best", "last"}
    validation = {"step", "val_p@1", "val_p@4", "val_maj@4"}
    assert [row.keys() >= validation for row in rows(run)] == [True, False, True]
    assert '"eval_every": 40' in (run / "config.json").read_text()  # more steps may follow
    assert rows(run)[0].keys() == validation and len(rows(run, "samples.jsonl")) == 2
    for name in ("best", "last"):
        model = transformers.AutoModelForCausalLM.from_pretrained(run / name)
        assert all(torch.equal(model.state_dict()[k], w) for k, w in weights(run, name).items())
        assert transformers.AutoTokenizer.from_pretrained(run / name).eos_token == "<|im_end|>"
    state = torch.load(run / "last" / "trainer.pt", weights_only=True)["optimizer"]
    assert (group := state["param_groups"][0])["eps"] == 1e-6 and group["lr"] == pytest.approx(3e-4 * 2 / 5)
    # asked for a state that is not there, torch makes one by a step: then this is 3
    assert {float(s["step"]) for s in state["state"].values()} == {2.0}


def test_limits(small, lab, tmp_path, monkeypatch):
    """--limit and --eval-limit reach every data set, and a prompt too long is not trained."""
    def load(data, split, limit):
        asked[split] = (data, limit)
        return [Record(str(n), "item " * n, "item", "5") for n in (1, 30, 2, 40, 3)]

    def generate(engine, prompts, *rest):
        seen.extend(prompts)
        return real(engine, prompts, *rest)

    asked, seen, real = {}, [], tsallis_rl.generate
    monkeypatch.setattr(tsallis_rl, "load", load)
    monkeypatch.setattr(tsallis_rl, "generate", generate)
    limit = len(lab[1].prompt("item " * 3))
    assert program([*small, "--data", "hotpotqa", "--limit", "6", "--eval-limit", "3", "--steps",
                    "3", "--prompt-limit", str(limit), "--out", str(tmp_path / "run")]) == 0
    assert asked == {"train": ("hotpotqa", 6), "validation": ("hotpotqa", 3)}
    assert set(map(tuple, seen)) == {tuple(lab[1].prompt("item " * n)) for n in (1, 2, 3)}


def test_batches(config):
    """Every epoch is a permutation of its own, and depends on the seed."""
    settings = config(batch_size=5)
    order = [i for step in range(1, 5) for _, i in batch_of(step, settings, 10)]
    assert sorted(order[:10]) == sorted(order[10:]) == [*range(10)] and order[:10] != order[10:]
    assert order[:5] != [i for _, i in batch_of(1, config(batch_size=5, seed=1), 10)]
    assert [epoch for epoch, _ in batch_of(2, config(batch_size=3), 4)] == [0, 1, 1]


@pytest.mark.parametrize("method", ("paft", "grpo"))
def test_every_draw_has_its_seed(method, small, tmp_path, monkeypatch):
    """No two random numbers of two runs share a seed, also where a record comes twice in a step
    and a generator keeps 32 bits. Validations of a run repeat theirs."""
    def sample_and_note(engine, rows, *rest):
        seeds[run].extend(seed for *_, seed in rows)
        return sample(engine, rows, *rest)

    def resample_and_note(log_w, K, generator):
        seeds[run].append(generator.initial_seed())
        return resample(log_w, K, generator)

    seeds, sample, resample = {"0": [], "1": []}, HFRollouts.sample, tsallis_rl.resample
    monkeypatch.setattr(HFRollouts, "sample", sample_and_note)
    monkeypatch.setattr(tsallis_rl, "resample", resample_and_note)
    for run in seeds:
        assert program([*small, "--limit", "3", "--batch-size", "4", "--method", method, "--steps",
                        "3", "--eval-every", "3", "--seed", run, "--out", str(tmp_path / run)]) == 0
    n = 3 * 2 * 2  # of a validation: prompts, samples, parts of a sample
    assert all(drawn[:n] == drawn[-n:] for drawn in seeds.values())
    once = [seed % 2**32 for drawn in seeds.values() for seed in drawn[:-n]]
    assert len(set(once)) == len(once) > 2 * (n + 3 * 4 * 2)


# --- One step -----------------------------------------------------------------------------
def test_reward(lab, config):
    """The reward is for the gold answer with an end token, and for nothing that looks like it."""
    def sample(rows, budget, stop):
        return [(ids, [-1.0]) for ids, _ in cases] if rows[0][1] else [([7], [-1.0])] * len(rows)

    template = lab[1]
    [four], [two] = map(template.encode, "42")
    end, start = template.end, template.special["<|im_start|>"]
    cases = [([four, two, end], 1), ([four, two], 0), ([four, start, two, end], 0),
             ([start, four, two, end], 0), ([four, two, start], 0), ([four, end], 0), ([end], 0),
             ([two, four, end], 0), ([four, two, *template.separator, end], 1), ([], 0),
             ([four, *template.close, two, end], 0)]
    run = SimpleNamespace(engine=SimpleNamespace(template=template, sample=sample),
                          config=config(method="grpo", M=len(cases), batch_size=1),
                          train=[(Record("", "", "", "42"), [7, 8])])
    [group] = sample_groups(run, 1)
    assert group.reward.tolist() == [reward for _, reward in cases]
    assert [r.y for r in group.rollouts] == [ids for ids, _ in cases]
    run.config = config(method="paft", M=3, batch_size=1)
    assert [r.y for r in sample_groups(run, 1)[0].rollouts] == [template.gold("42")] * 3


def test_metrics(config):
    """The metrics of a prompt are the written-out ones, and a step's are their means."""
    w, q, M = [0.5, 0.1, 0.02, 0.3], 0.5, 4
    wbar = sum(w) / M
    c = [x / wbar**q - ((sum(w) - x) / (M - 1)) ** (1 - q) for x in w]
    rollouts = [Rollout([1] * n, [], [2] * 2, []) for n in (3, 5, 2, 4)]
    group = Group(Record("0", "", "", "5"), [1] * 11, rollouts, torch.tensor([1.0, 0, 0, 0]), 0)
    row = prompt_metrics(group, torch.tensor(w).log(), [0, 2, 3], torch.tensor([0.1, 0.3]),
                         config(method="garl", q=q, M=M))
    expected = {"loss": (1 - wbar ** (1 - q)) / (1 - q), "log_P": math.log(wbar),
                "ess": sum(w) ** 2 / sum(x * x for x in w), "sampler_gap": 0.2, "trained": 0.75,
                "effective_reward": max(w) / wbar**q / M**q, "rationale_tokens": 3.5,
                "amplified_advantage": max(c) / M**q}
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    grpo = prompt_metrics(group, torch.zeros(4), [], torch.zeros(0), config(method="grpo", M=M))
    assert grpo["reward"] == 0.25 and grpo["loss"] == 0.75 and "sampler_gap" not in grpo
    assert tsallis_rl.mean_of([{"a": 1.0}, {"a": 2.0, "b": 4.0}]) == {"a": 1.5, "b": 4.0}


def stepped(monkeypatch, config, gradients, **settings):
    """The change of the parameters and the row of each step, for given gradients."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    model = SimpleNamespace(parameters=lambda: [p], num_parameters=lambda: 2)
    settings = config(eval_every=99, **settings)
    run = SimpleNamespace(config=settings, model=model, step=0,
                          engine=SimpleNamespace(sync=lambda model: None),
                          optimizer=tsallis_rl.make_optimizer(model, settings))

    def group_gradient(model, gradient, config):
        p.grad = torch.tensor(gradient)
        return None, {"sampler_gap": 0.0, "q of the gradient": config.q}

    monkeypatch.setattr(tsallis_rl, "group_gradient", group_gradient)
    monkeypatch.setattr(tsallis_rl, "sample_groups", lambda run, step: [gradients[step - 1]])
    history = []
    for step in range(1, len(gradients) + 1):
        before = p.detach().clone()
        row = tsallis_rl.train_step(run, step)
        history.append(((p.detach() - before).tolist(), row))
    return history


def test_update(monkeypatch, config):
    """A step has the length lr min(norm, clip), and lr rises linearly in the warm-up."""
    gradients = [[0.3, 0.4], [3.0, 4.0], [0.03, 0.04], [3.0, 4.0], [3.0, 4.0]]
    history = stepped(monkeypatch, config, gradients, optimizer="sgd", lr=0.1, warmup=4, clip=0.5)
    for (change, row), norm, lr in zip(history, (0.5, 5, 0.05, 5, 5), (1, 2, 3, 4, 4)):
        assert row["grad_norm"] == pytest.approx(norm) and row["lr"] == pytest.approx(lr / 40)
        length = -lr / 40 * min(norm, 0.5)
        assert change == pytest.approx([0.6 * length, 0.8 * length], rel=1e-4)


def test_eps(monkeypatch, config):
    """--eps is AdamW's, and above_eps is the share of clipped gradients above it."""
    for eps, above in ((0.4001, 0), (0.35, 0.5), (0.25, 1)):  # the gradient is 0.3 and 0.4
        [(change, row)] = stepped(monkeypatch, config, [[3.0, 4.0]], lr=0.1, warmup=0, clip=0.5,
                                  eps=eps)
        assert row["above_eps"] == above
        assert change == pytest.approx([-0.1 * g / (g + eps) for g in (0.3, 0.4)], rel=1e-4)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_not_finite(bad, monkeypatch, config):
    """A gradient that is not finite moves neither the weights nor AdamW's state."""
    settings = dict(lr=0.1, warmup=0)
    history = stepped(monkeypatch, config, [[3.0, 4.0], [bad, 1.0], [1.0, 1.0]], **settings)
    plain = stepped(monkeypatch, config, [[3.0, 4.0], [1.0, 1.0]], **settings)
    assert history[1][0] == [0, 0] and history[1][1]["above_eps"] is None
    assert [history[i][0] for i in (0, 2)] == [x for x, _ in plain]


def test_q_of(monkeypatch, config):
    """A schedule moves q linearly from its start to its end, in the log and in the gradient."""
    for settings, qs in ((dict(q=0.9, q_end=0.1, q_steps=4), [0.7, 0.5, 0.3, 0.1, 0.1]),
                         (dict(q=0.3), [0.3, 0.3])):
        history = stepped(monkeypatch, config, [[1.0, 1.0]] * len(qs), lr=0.1, **settings)
        assert [row["q"] for _, row in history] == pytest.approx(qs)
        assert [row["q of the gradient"] for _, row in history] == pytest.approx(qs)


def test_methods(config):
    """Each method has its coefficients; garl-score is GARL without its pathwise term."""
    log_w, reward = torch.tensor([0.5, 0.1, 0.02, 0.3]).log(), torch.tensor([1.0, 0, 0, 1])
    group = Group(None, [], [], reward, 7)
    of = lambda **settings: coefficients(log_w, group, config(M=4, q=0.3, **settings))
    a, b = tsallis_rl.garl_coefficients(log_w, 0.3)
    assert torch.equal(of(method="garl")[0], a) and torch.equal(of(method="garl")[1], b)
    assert torch.equal(of(method="garl-score")[0], a) and not of(method="garl-score")[1].any()
    assert torch.equal(of(method="grpo")[0], tsallis_rl.grpo_coefficients(reward)[0])
    for K in (None, 1, 9):
        n = of(method="paft", K=K)[0] / log_w.exp().double().mean() ** 0.7 * (K or 4) * 4**0.3
        assert n.sum().item() == pytest.approx(K or 4) and torch.allclose(n, n.round())


@pytest.mark.parametrize("errors, code", (([0.0005], 0), ([0.01, -0.01], 2), ([math.nan], 2)))
def test_stale_sampler(errors, code, small, tmp_path, monkeypatch, capsys):
    """A sampler that disagrees stops the run before its step, even if errors cancel."""
    sample, run = HFRollouts.sample, str(tmp_path / "run")
    assert program([*small, "--steps", "1", "--out", run]) == 0
    before = weights(run)
    monkeypatch.setattr(HFRollouts, "sample", lambda *args: [
        (ids, [x + errors[i % len(errors)] for i, x in enumerate(log_p)])
        for ids, log_p in sample(*args)])
    assert program(["--resume", run, "--steps", "2"]) == code
    assert ("sampler and trainer differ" in capsys.readouterr().err) == (code == 2)
    assert equal(weights(run), before) == (code == 2)


# --- It learns ----------------------------------------------------------------------------
SHORT = ["--rollout", "hf", "--M", "8", "--lr", "6e-4", "--eval-limit", "24"]


def test_warm_run_learns(tmp_path):
    """From a warm start PAFT learns, where at first voting does not help."""
    run = tmp_path / "run"
    assert program([*SHORT, "--method", "paft", "--steps", "10", "--out", str(run)]) == 0
    log = rows(run)
    assert 10 <= log[0]["val_p@1"] <= 30 and log[0]["val_maj@16"] <= 35
    assert log[-1]["val_maj@16"] >= 50 and log[-1]["log_P"] > log[1]["log_P"]


def test_cold_run_learns(tmp_path):
    """From a cold start GRPO has no gradient, and GARL learns."""
    cold = [*SHORT, "--start", "cold", "--steps"]
    grpo, garl = str(tmp_path / "grpo"), str(tmp_path / "garl")
    assert program([*cold, "3", "--method", "grpo", "--out", grpo]) == 0
    assert program([*cold, "15", "--method", "garl", "--out", garl]) == 0
    assert all(row["grad_norm"] == 0 and row["reward"] == 0 for row in rows(grpo)[1:])
    assert rows(garl)[0]["val_p@16"] == 0 and rows(garl)[1]["log_P"] < -8
    assert rows(garl)[-1]["val_p@1"] >= 20
