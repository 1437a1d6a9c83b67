"""The study behind "What we found" in README.md: its runs, their logs, tables and figures.

    python data/study.py predict gate rate cold warm noise schedule   # what data/results/ lacks: hours
    python data/study.py real --model SMOLLM2 --official DIR          # SmolLM2-135M-Instruct on rows of the benchmarks
    python data/study.py --figures                                    # data/figures/ and tables, from data/results/

A line of data/results/TABLE.jsonl is one run: its command, which repeats it, the columns of its metrics.jsonl, and
what `eval.py --split test` says of its best checkpoint (on 100 rows; for noise and schedule these are the noisy
training rows, or without noise the training rows). Data sets that commands name are made first, below runs/study.

Contents: 1 the tables, 2 running them, 3 the gate's line, 4 tables and figures, 5 main.
"""
import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.files import append_jsonl, jsonl, read_jsonl, read_log, write_atomic

RESULTS, FIGURES, WORK = ROOT / "data" / "results", ROOT / "data" / "figures", Path("runs", "study")

# ---------------------------------------------------------------------------------------------------------------------
# 1. The tables: name -> command line of a run, and the data sets that they name
# ---------------------------------------------------------------------------------------------------------------------
SEEDS = (0, 1, 2)
QS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
FORMS = {"plain": "N", "colon": ": N", "bracket": "[N", "brackets": "[[N"}  # colder and colder
OPTIMIZERS = {"adamw-1e-8": "", "adamw-1e-20": "--eps 1e-20", "sgd": "--optimizer sgd --lr 0.1"}
LAB = "--rollout hf --model data/ledger/model --think-budget 24 --answer-budget 8 --M 16"
NOISE = (0, 10, 30)  # percent
RATES = (0.03, 0.1, 0.3, 1, 3)  # of SGD
DECAY = "--q-end 0 --q-steps 40"


def gate(method: str, optimizers: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Where a start is passed: cold, 40 steps, answers of four forms."""
    for form, (optimizer, options), q, seed in itertools.product(FORMS, optimizers.items(), QS, SEEDS):
        yield (f"{method} {form} {optimizer} q={q:g} seed={seed}",
               f"{LAB} --batch-size 2 --data {WORK}/{form} --start cold --method {method} --q {q:g} --steps 40 "
               f"--lr 3e-4 --limit 200 --eval-every 40 --eval-limit 1 --eval-samples 1 {options} --seed {seed}")


def learning(start: str, methods: dict[str, tuple], options: dict[str, str], data: str, more: str) -> Iterator:
    """Runs with validation: methods name -> its values of q."""
    for (variant, option), (method, qs), seed in itertools.product(options.items(), methods.items(), SEEDS):
        for q in qs:
            yield (f"{method} {variant} q={q:g} seed={seed}",
                   f"{LAB} --batch-size 4 --data {data} --start {start} --method {method} --q {q:g} {option} {more} "
                   f"--eval-limit 24 --seed {seed}")


def tables() -> dict[str, list[tuple[str, str]]]:
    """Table -> its runs."""
    cold = {"grpo": (0,), "garl": (0, 0.25, 0.5, 0.75, 1)}
    warm = {"grpo": (0,), "garl": (0, 0.25, 0.75, 1), "paft": (0, 0.25, 0.75, 1), "garl-score": (0.75,)}
    short = "--steps 48 --eval-every 16"
    long = "--lr 3e-4 --steps 80 --eval-every 20"
    noisy = lambda share, variant, qs, option="", bracket=False: learning(
        "cold", {"garl": qs}, {f"{variant}noise={share}%": option}, f"{WORK}/noise{share}" + "-bracket" * bracket, long)
    return {
        "gate": [*gate("garl", OPTIMIZERS), *gate("paft", {"adamw-1e-8": ""})],
        "rate": list(learning("cold", {"garl": (1,)}, {f"sgd-{lr}": f"--optimizer sgd --lr {lr}" for lr in RATES},
                              "ledger", short)),
        "cold": list(learning("cold", cold, {"adamw": "--lr 3e-4", "sgd": "--optimizer sgd --lr 0.3"}, "ledger",
                              short)),
        "warm": list(learning("warm", warm, {f"lr={lr}": f"--lr {lr}" for lr in ("3e-4", "1e-3", "3e-3")}, "ledger",
                              short)),
        "noise": [run for share in NOISE for run in noisy(share, "", (0, 0.5, 0.75, 1))],
        "schedule": [run for share in NOISE for run in noisy(share, "1-to-0,", (1,), DECAY)]
                    + [run for share in (0, 30) for run in (
                        *noisy(share, "gate-8,", (1,)),
                        *noisy(share, "bracket,", (0, 0.75, 1), bracket=True),
                        *noisy(share, "bracket,1-to-0,", (1,), DECAY, True),
                        *noisy(share, "bracket,gate-8,", (1,), bracket=True))],
    }


def make_data() -> None:
    """The colder sets, and ledger with 100 training rows of which a share has another row's answer; the test split of
    a noisy set holds its noisy rows, so that accuracy on it is the share that was memorised."""
    for name, form in FORMS.items():
        if not (WORK / name / "test.jsonl").exists():
            make = [sys.executable, ROOT / "data" / "make_ledger.py", f"--form={form}", "--out", WORK / name]
            subprocess.run(make, check=True)
    sources = {"": ROOT / "data/ledger", "-bracket": WORK / "bracket"}
    for share, (form, source) in itertools.product(NOISE, sources.items()):
        folder, rng = WORK / f"noise{share}{form}", random.Random(0)
        if (folder / "validation.jsonl").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for _, row in read_jsonl(source / "train.jsonl")][:100]  # so that a per cent is a row
        noisy = [row | {"answer": rng.choice([r["answer"] for r in rows if r["answer"] not in row["answer"]
                                              and row["answer"] not in r["answer"]])} for row in rows[:share]]
        splits = {"train": noisy + rows[share:], "test": noisy or rows}
        for split, lines in splits.items():
            write_atomic(folder / f"{split}.jsonl", jsonl(lines))
        shutil.copy(source / "validation.jsonl", folder)


REAL = "--rollout hf --dtype bfloat16 --prompt-limit 700 --think-budget 32 --answer-budget 16 --batch-size 2 --M 4"


def real(model: str) -> list[tuple[str, str]]:
    """Real language: rows of FinQA as they are, of the others with the supporting paragraphs and one more."""
    methods = (("garl", 0.75), ("grpo", 0), ("paft", 0.75), ("garl", 0))
    return [(f"{name} {start} {method} q={q:g} seed={seed}",
             f"{REAL} --model {model} --data {name}:{WORK}/{name} --start {start} --method {method} --q {q:g} "
             f"--steps 12 --lr 1e-4 --eval-every 12 --eval-limit {12 if name == 'finqa' else 2} --eval-samples 2 "
             f"--seed {seed}")
            for seed in (0, 1) for start in ("cold", "warm") for name in ("finqa", "hotpotqa", "musique")
            for method, q in methods]


def shorten(official: Path) -> None:
    """FinQA's files as they are; HotpotQA's and MuSiQue's with the supporting paragraphs of a question and the first
    of the others, in their order."""
    from data import BENCHMARKS
    for name in ("finqa", "hotpotqa", "musique"):
        (WORK / name).mkdir(parents=True, exist_ok=True)
        for file in {*BENCHMARKS[name].files} & {path.name for path in (official / name).iterdir()}:
            text = (official / name / file).read_text()
            rows = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)
            for row in rows:
                if name == "hotpotqa":
                    needed = {title for title, _ in row["supporting_facts"]}
                    other = next(title for title, _ in row["context"] if title not in needed)
                    row["context"] = [part for part in row["context"] if part[0] in needed | {other}]
                elif name == "musique":
                    other = next(part["idx"] for part in row["paragraphs"] if not part["is_supporting"])
                    row["paragraphs"] = [p for p in row["paragraphs"] if p["is_supporting"] or p["idx"] == other]
            write_atomic(WORK / name / file, jsonl(rows) if file.endswith("l") else json.dumps(rows))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Running them
# ---------------------------------------------------------------------------------------------------------------------
COLUMNS = ("q", "log_P_mean", "loss", "reward", "ess", "grad_norm", "above_eps", "rationale_tokens", "val_p@1",
           "val_p@16", "val_maj@16")


def columns(path: Path, names: tuple[str, ...] = COLUMNS) -> dict[str, list]:
    """What a metrics.jsonl holds, by columns, with four digits; a column of nothing is left out."""
    rows = read_log(path)
    short = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
    table = {name: [short(row.get(name)) for row in rows] for name in names}
    return {name: values for name, values in table.items() if any(x is not None for x in values)}


def with_and_without(name: str, command: str) -> list[float]:
    """Mean log P of a model on four validation rows, with four of its own rationales, and with an empty one."""
    import torch
    import tsallis_rl as t
    from data import load
    config = t.parse(command.split())
    model, fmt = t.load_model(name, torch.device("cpu"))
    examples = t.encode(load(config.data, "validation", 40), config, fmt, 8192)
    rows = []
    for i, (record, prompt) in enumerate([example for example in examples if example[1]][:4]):
        seed = t.seed_of(config.seed, "with", i)
        [rollouts] = t.generate(t.HFRollouts(model, fmt, config), [prompt], [seed], 4, config.think_budget, 0)
        rollouts.append(t.Rollout([], False, [], []))
        responses = [t.respond(rollout, fmt.gold(record.answer), fmt) for rollout in rollouts]
        group = t.Group(record, prompt, rollouts, responses, None, seed)
        with torch.no_grad():
            _, _, log_w, _ = t.score(t.SharedPrompt(model, prompt, config), group, list(range(5)))
        rows.append((log_w[:4].logsumexp(0).item() - math.log(4), log_w[4].item()))
    return [round(fmean(column), 2) for column in zip(*rows)]


@contextlib.contextmanager
def gated(c: float) -> Iterator[None]:
    """In place of --q the schedule that the gate suggests, which did not earn a setting: q = max(0, 1 - c / |log P|),
    from a running mean of the steps' log P."""
    import tsallis_rl as t
    q_of, train_step, log_P = t.q_of, t.train_step, -math.inf

    def watched(run, step: int) -> dict:
        nonlocal log_P
        row = train_step(run, step)
        log_P = 0.8 * log_P + 0.2 * row["log_P_mean"] if step else row["log_P_mean"]
        return row

    t.train_step, t.q_of = watched, lambda step, config: max(0.0, 1 - c / max(1e-9, -log_P))
    yield
    t.train_step, t.q_of = train_step, q_of


def run_one(job: tuple[str, str, str]) -> dict:
    """One run, in this process, and its best checkpoint on the test split."""
    import torch
    import tsallis_rl
    from data import load
    from eval import summarize
    torch.set_num_threads(1)
    table, name, command = job
    out, start = WORK / table / name.replace(" ", "_"), time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    shown = dict(real("SMOLLM2"))[name] if table == "real" else command  # a folder's name is nobody else's
    line = {"run": name, "command": f"OMP_NUM_THREADS=1 python tsallis_rl.py {shown}"}
    schedule = contextlib.nullcontext()
    if "gate-8," in name:
        line["command"], schedule = f"python data/study.py {table} --only '{name}'", gated(8)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        with schedule:
            code = tsallis_rl.main([*command.split(), "--out", str(out)])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run's own would keep the pool from ending
        if table not in ("gate", "real") and code == 0:
            config = replace(tsallis_rl.parse(command.split()), model=str(out / "best"), eval_samples=16)
            records = load(config.data, "test", 100)
            line["test"] = summarize(tsallis_rl.answers_to(config, records), records)
        if table == "real" and code == 0 and "grpo" not in name:
            line["log_P, start"] = with_and_without(tsallis_rl.parse(command.split()).model, command)
            line["log_P, end"] = with_and_without(str(out / "last"), command)
    line |= {"exit": code, "seconds": round(time.perf_counter() - start, 1)}
    line["metrics"] = columns(out / "metrics.jsonl", COLUMNS if table != "gate" else ("log_P_mean", "above_eps"))
    if table in ("gate", "real"):
        shutil.rmtree(out)
    return line


def run_tables(todo: list[tuple[str, str, str]], jobs: int) -> None:
    """The runs (table, name, command) that data/results/ lacks, `jobs` at a time, each on one thread."""
    RESULTS.mkdir(exist_ok=True)
    done = {table: {line["run"] for line in read(table)} for table, *_ in todo}
    todo = [job for job in todo if job[1] not in done[job[0]]]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        try:
            for i, (job, line) in enumerate(zip(todo, pool.imap(run_one, todo)), 1):
                append_jsonl(RESULTS / f"{job[0]}.jsonl", [line])
                print(f"{i}/{len(todo)} {job[0]} {line['run']}: {line['seconds']} s", flush=True)
        except BaseException:  # Ctrl-C: to what the pool sends them next, runs would answer by saving, and never end
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def variance() -> None:
    """GARL's and PAFT's gradient from M rollouts beside GARL's from 2,048, theirs among them, without M^q: mean cosine
    and length over 32 pools, and the length of the pools' mean, in which the variance is a 32nd; over two prompts, to
    data/results/variance.json."""
    import torch
    import tsallis_rl as t
    from data import load
    rows = []
    for start in ("warm", "cold"):
        config = t.parse([*LAB.split(), "--start", start, "--batch-size", "1"])
        model, fmt = t.load_model(config.model, torch.device("cpu"))
        for i, (record, prompt) in enumerate(t.encode(load("ledger", "train", 2), config, fmt, 1024)):
            [pool] = t.generate(t.HFRollouts(model, fmt, config), [prompt], [t.seed_of("variance", i)], 2048, 24, 0)
            answers = [t.respond(rollout, fmt.gold(record.answer), fmt) for rollout in pool]

            def gradient(method: str, q: float, M: int, first: int) -> torch.Tensor:
                part = slice(first, first + M)
                group = t.Group(record, prompt, pool[part], answers[part], None, t.seed_of("pool", first))
                model.zero_grad()
                t.group_gradient(model, group, replace(config, method=method, q=q, M=M, K=M))
                return torch.cat([p.grad.flatten() for p in model.parameters()]) * M**q

            for q in (0, 0.5, 0.75, 1):
                true = gradient("garl", q, 2048, 0)
                for method, M in itertools.product(("garl", "paft"), (2, 8, 32)):
                    pools = torch.stack([gradient(method, q, M, M * k) for k in range(32)])
                    cosine = torch.cosine_similarity(pools, true[None], -1).mean().item()
                    lengths = [x.norm().item() / true.norm().item() for x in (*pools, pools.mean(0))]
                    row = {"cosine": cosine, "length": fmean(lengths[:-1]), "length of the mean": lengths[-1]}
                    rows.append({"start": start, "prompt": i, "method": method, "q": q, "M": M}
                                | {name: round(value, 3) for name, value in row.items()})
    (RESULTS / "variance.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]\n")


def read(table: str) -> list[dict]:
    """The runs of a table; none if it was not run."""
    return read_log(RESULTS / f"{table}.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# 3. The gate's line, from step 0 alone
# ---------------------------------------------------------------------------------------------------------------------
# GARL's gradient of weight i is s g_i, where g is that at q = 1 (which is grad log P / M) and s = (M P)^(1-q). AdamW's
# step divides it by its own size as long as that is above eps (or above about 1e-21, whose square float32 no longer
# holds), so that log P rises by lr M sum_i |g_i| s |g_i| / (s |g_i| + eps) a step: the full rate, whatever q, while
#
#     (1 - q) (|log P0| - log M) < log(g1 / eps),     g1: half of the sum of |g| is in weights above it
#
# and next to nothing beyond. SGD's log P rises by lr M s |g|^2 a step. With g held at its start the rate can be summed
# up to a predicted step of escape.
def predict() -> None:
    """log P0 and the distribution of |g| of each form, over the seeds, to data/results/gate-line.json: from step 0."""
    import torch
    import tsallis_rl
    make_data()
    line = {}
    for form in FORMS:
        log_P, g = [], []
        for seed in SEEDS:
            command = dict(gate("garl", {"adamw-1e-8": ""}))[f"garl {form} adamw-1e-8 q=1 seed={seed}"]
            config = tsallis_rl.parse([*command.split(), "--clip", "1e9"])
            (WORK / "predict").mkdir(exist_ok=True)
            run = tsallis_rl.start_run(config, WORK / "predict", torch.device("cpu"))
            results, _ = tsallis_rl.update(run, tsallis_rl.sample_groups(run, 0), 0)
            log_P.append(fmean(row["log_P_mean"] for *_, row in results))
            g.append(torch.cat([p.grad.abs().flatten() for p in run.model.parameters()]).double().sort().values)
        g = torch.stack(g).mean(0)  # by rank
        shares = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)  # of the sum of |g|
        line[form] = {"log_P0": fmean(log_P), "sum": g.sum().item(), "squares": g.square().sum().item(),
                      "g": g[torch.searchsorted(g.cumsum(0) / g.sum(), shares)].tolist()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gate-line.json").write_text(json.dumps(line) + "\n")


def room(optimizer: str, start: dict) -> float:
    """The line's right-hand side in nats, log(g1 / eps). AdamW only."""
    return math.log(start["g"][50] / max(float(optimizer.removeprefix("adamw-")), 1e-21))


def predicted(optimizer: str, start: dict, q: float, M: int = 16, steps: int = 1000) -> int | None:
    """The step at which log P has come half of its way to 0; None if not within `steps`."""
    log_P = start["log_P0"]
    for step in range(1, steps + 1):
        s, warmup = math.exp((1 - q) * (log_P + math.log(M))), min(1, step / 5)
        if optimizer == "sgd":
            norm = s * start["squares"]**0.5  # clipped at 1
            rate = 0.1 * M * s * start["squares"] / max(1, norm)
        else:
            eps = max(float(optimizer.removeprefix("adamw-")), 1e-21)
            rate = 3e-4 * M * start["sum"] * fmean(s * g / (s * g + eps) for g in start["g"])
        log_P += warmup * rate
        if log_P > start["log_P0"] / 2:
            return step
    return None


def escape(line: dict) -> int | None:
    """The first step at which mean log P has come half of the way from its start to 0; None if it never does."""
    log_P = line["metrics"]["log_P_mean"]
    return next((step for step, x in enumerate(log_P) if x is not None and x > log_P[0] / 2), None)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Tables and figures
# ---------------------------------------------------------------------------------------------------------------------
def spread(values: list[float], form: str = ".0f") -> str:
    """Mean and range over the seeds."""
    return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "-"


def gate_cells() -> dict[tuple, list]:
    """(method, optimiser, form, q) -> the seeds' steps of escape."""
    cells = defaultdict(list)
    for line in read("gate"):
        method, form, optimizer, q, _ = line["run"].split()
        cells[method, optimizer, form, float(q[2:])].append(escape(line))
    return cells


def middle(steps: list) -> int | None:
    """The median of steps, where None comes last."""
    return sorted(steps, key=lambda step: math.inf if step is None else step)[len(steps) // 2]


def print_gate() -> None:
    """A row per method, optimiser and form: the median step of escape / the predicted one, at each q."""
    start, cells, right = json.loads((RESULTS / "gate-line.json").read_text()), gate_cells(), defaultdict(list)
    print("steps of escape, median of the seeds / predicted; room: log(g1 / eps)\n")
    print("| method | optimiser | log P0 | room |", " | ".join(f"q = {q:g}" for q in QS), "|\n" + "|---" * 10 + "|")
    by_start = lambda key: (*key[:2], -start[key[2]]["log_P0"])
    for method, optimizer, form in sorted({key[:3] for key in cells}, key=by_start):
        row, log_P0 = [], start[form]["log_P0"]
        limit = math.nan if optimizer == "sgd" else room(optimizer, start[form])
        for q in (q for q in QS if (method, optimizer, form, q) in cells):
            seen, told = middle(cells[method, optimizer, form, q]), predicted(optimizer, start[form], q)
            right["by steps", method, optimizer].append((seen is not None) == (told is not None and told <= 40))
            if optimizer != "sgd":
                below = (1 - q) * (-log_P0 - math.log(16)) < limit
                right["by line", method, optimizer].append((seen is not None) == below)
            row.append(f"{seen or 'flat'} / {told or 'never'}")
        print(f"| {method} | {optimizer} | {log_P0:.0f} | {limit:.1f} | " + " | ".join(row) + " |")
    for (rule, method, optimizer), hits in sorted(right.items()):
        print(f"{rule}, {method}, {optimizer}: {sum(hits)} of {len(hits)} cells on the predicted side")
    for rule in ("by line", "by steps"):
        hits = [hit for key, some in right.items() if key[0] == rule for hit in some]
        print(f"all {rule}: {sum(hits)} of {len(hits)} cells")


def print_learning(table: str) -> None:
    """A row per method, variant and q: validation, then the best checkpoint on the test split."""
    place = {name: i for i, (name, _) in enumerate(tables().get(table, ()))}
    groups = defaultdict(list)
    for line in sorted(read(table), key=lambda line: place.get(line["run"], 0)):
        groups[line["run"].rsplit(" seed", 1)[0]].append(line)
    rows = "the noisy training rows" if table in ("noise", "schedule") else "test"
    print(f"| run | log P, last | maj@16 on validation: means by step; last | p@1 | p@16 | maj@16 on {rows} |")
    print("|---" * 6 + "|")
    for name, lines in groups.items():
        columns = [[x for x in line["metrics"]["val_maj@16"] if x is not None] for line in lines
                   if "val_maj@16" in line["metrics"]]
        steps = ", ".join(f"{fmean(at):.0f}" for at in zip(*columns))
        log_P = [x[-1] for line in lines if (x := line["metrics"].get("log_P_mean"))]
        test = [spread([line["test"][key] for line in lines if "test" in line]) for key in ("p@1", "p@16", "maj@16")]
        cells = spread(log_P, ".1f"), f"{steps}; {spread([column[-1] for column in columns])}", *test
        print("|", " | ".join((name, *cells)), "|")
        for moment in ("log_P, start", "log_P, end"):  # of the table "real"
            for with_z, without in (line[moment] for line in lines if moment in line):
                print(f"    {moment}: {with_z} with its own rationales, {without} with an empty one")


def gate_figure(pyplot) -> None:
    """data/figures/gate.png: a mark for each run, and what step 0 predicts."""
    start, cells = json.loads((RESULTS / "gate-line.json").read_text()), gate_cells()
    pairs = list(dict.fromkeys(key[:2] for key in cells))
    size = (3.3 * len(pairs), 3.8)
    figure, axes = pyplot.subplots(1, len(pairs), figsize=size, layout="constrained", sharey=True)
    for axis, (method, optimizer) in zip(axes, pairs):
        for (*pair, form, q), steps in cells.items():
            for i, step in enumerate(steps if tuple(pair) == (method, optimizer) else ()):  # a mark a seed
                look = dict(c=[step], cmap="viridis", vmin=5, vmax=40) if step else dict(marker="x", c="black")
                shown = axis.scatter(q + 0.03 * (i - 1), -start[form]["log_P0"], s=24, **look)
                drawn = shown if step is not None else drawn
        qs, typical = [i / 100 for i in range(101)], start["bracket"]
        stays = lambda q, y: predicted(optimizer, typical | {"log_P0": -y}, q, steps=40) is None
        edge = [next((y for y in range(1, 100) if stays(q, y)), 100) for q in qs]
        axis.plot(qs, edge, c="crimson", label="40 steps, predicted")
        if optimizer != "sgd":
            line = [min(999, math.log(16) + room(optimizer, typical) / max(1e-9, 1 - q)) for q in qs]
            axis.plot(qs, line, "--", c="crimson", label="(1 - q)(|log P| - log M) = log(g1 / eps)")
        axis.set(xlabel="q", title=f"{method}, {optimizer}", ylim=(0, 95))
    axes[0].set(ylabel="|log P| at the start (nats)")
    axes[0].legend(loc="upper left", fontsize=7)
    figure.colorbar(drawn, ax=axes, label="step of escape (x: none in 40)")
    figure.savefig(FIGURES / "gate.png", dpi=130)


def learning_figure(pyplot) -> None:
    """data/figures/learning.png: validation over the steps of the cold, noisy and warm runs."""
    panels = {"adamw": "cold start, AdamW", "sgd": "cold start, SGD", "noise=30%": "cold start, 30% wrong golds",
              "lr=3e-4": "warm start, lr 3e-4", "lr=1e-3": "warm start, lr 1e-3", "lr=3e-3": "warm start, lr 3e-3"}
    colors = {"q=0": "C0", "q=0.25": "C1", "q=0.5": "C2", "q=0.75": "C3", "q=1": "C4"}
    styles = {"garl": "-", "paft": "--", "garl-score": ":"}
    groups = defaultdict(list)
    for line in [line for table in ("cold", "noise", "schedule", "warm") for line in read(table)]:
        method, variant, q, _ = line["run"].split()
        look = (colors[q], styles[method]) if method != "grpo" else ("black", "-.")
        label = "grpo" if method == "grpo" else f"{method} {q}"
        if variant.startswith("1-to-0,"):
            variant, label, look = variant.removeprefix("1-to-0,"), "garl q=1 to 0", ("C5", "-")
        groups[variant, label, look].append(line["metrics"]["val_maj@16"])
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained", sharey=True)
    for axis, (shown, title) in zip(axes.flat, panels.items()):
        for (variant, label, (color, style)), runs in sorted(groups.items(), key=lambda item: item[0][1]):
            if variant == shown:
                steps = [i for i, x in enumerate(runs[0]) if x is not None]
                at = [[run[i] for run in runs] for i in steps]
                axis.plot(steps, [fmean(x) for x in at], style, color=color, label=label)
                axis.fill_between(steps, [min(x) for x in at], [max(x) for x in at], alpha=0.12, color=color)
        axis.set(title=title, xlabel="step", ylim=(-3, 103))
        axis.legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set(ylabel="validation maj@16 (%), mean and range of seeds")
    figure.savefig(FIGURES / "learning.png", dpi=110)


def figures() -> None:
    """The figures of what was run, and the tables to the terminal."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    FIGURES.mkdir(exist_ok=True)
    if read("gate"):
        print_gate()
        gate_figure(pyplot)
    if read("cold") and read("warm"):
        learning_figure(pyplot)
    if (path := RESULTS / "variance.json").exists():
        print("\nvariance: gradients from M rollouts beside that from 2,048, cosine and ratio of lengths\n")
        print("| start | method | q | M | cosine | length | length of the mean |\n" + "|---" * 7 + "|")
        pairs = defaultdict(list)  # the two prompts
        for row in json.loads(path.read_text()):
            pairs[row["start"], row["method"], row["q"], row["M"]].append(list(row.values())[5:])
        for key, values in pairs.items():
            print("|", " | ".join([*map(str, key), *(f"{fmean(column):.2f}" for column in zip(*values))]), "|")
    for table in (*tables(), "real"):
        if table != "gate" and read(table):
            print(f"\n{table}\n")
            print_learning(table)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Main
# ---------------------------------------------------------------------------------------------------------------------
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    known = [*tables(), "predict", "variance", "real"]
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"what to run: {', '.join(known)}")
    parser.add_argument("--only", default="", help="of their runs those with these words in the name")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--model", help="for real: the folder of SmolLM2-135M-Instruct")
    parser.add_argument("--official", type=Path, help="for real: a folder with finqa/, hotpotqa/, musique/")
    parser.add_argument("--figures", action="store_true", help="draw the figures and print the tables")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(known):
        parser.error(f"no such table: {', '.join(unknown)}")
    if "real" in given.tables and not (given.model and given.official):
        parser.error("real needs --model and --official")
    os.chdir(ROOT)
    if given.tables:
        make_data()
    if "predict" in given.tables:
        predict()
    if "variance" in given.tables:
        variance()
    if "real" in given.tables:
        shorten(given.official)
    runs = {**tables(), "real": real(given.model), "predict": [], "variance": []}
    todo = [(table, *run) for table in given.tables for run in runs[table]]
    run_tables([job for job in todo if all(word in job[1].split() for word in given.only.split())], given.jobs)
    if given.figures:
        figures()


if __name__ == "__main__":
    main()
