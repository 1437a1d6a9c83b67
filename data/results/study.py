"""
The study: the runs behind the findings, their logs, tables and figures.

    python data/results/study.py data             # make the data sets that the commands name
    python data/results/study.py cold warm        # run what a table still lacks (hours)
    python data/results/study.py --figures        # print all tables, draw all figures
    python data/results/study.py hotpotqa --model SMOLLM2 --official FOLDER

data/results/README.md tells what was found. A line of data/results/TABLE.jsonl is one run: the
command that repeats it, the columns of its metrics.jsonl, and how its best checkpoint did on
held-out rows.

Contents: 1 the runs, 2 their data, 3 running them, 4 when a start is passed, 5 the variance of
the estimators, 6 tables, 7 figures, 8 main.
"""
import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.files import append_jsonl, exit_code, read_jsonl, read_log

RESULTS = ROOT / "data" / "results"
WORK = Path("runs", "study")  # data sets and run folders
SEEDS = (0, 1, 2)


# --- 1. The runs ----------------------------------------------------------------------
# A table is a list of (name, command line). A name is "method variant q=Q seed=S".
Job = tuple[str, str]

LAB = ("--rollout hf --model data/ledger/model --think-budget 24 --answer-budget 8 --M 16")
FORMS = {"plain": "N", "colon": ": N", "bracket": "[N", "brackets": "[[N"}  # colder and colder
OPTIMIZERS = {"adamw-1e-8": "", "adamw-1e-20": "--eps 1e-20", "sgd": "--optimizer sgd --lr 0.1"}
QS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the gate
NOISE = (0, 10, 30)  # percent
DECAY = "--q-end 0 --q-steps 40"


def gate(method: str, optimizers: dict[str, str]) -> Iterator[Job]:
    """Which starts are passed: cold, 40 steps, answers of four forms."""
    cells = itertools.product(FORMS, optimizers.items(), QS, SEEDS)
    for form, (optimizer, options), q, seed in cells:
        yield (f"{method} {form} {optimizer} q={q:g} seed={seed}",
               f"{LAB} --batch-size 2 --data {WORK}/{form} --start cold --method {method} "
               f"--q {q:g} --steps 40 --lr 3e-4 --limit 200 --eval-every 40 --eval-limit 1 "
               f"--eval-samples 1 {options} --seed {seed}")


def learning(start: str, methods: dict[str, tuple], variants: dict[str, str], data: str,
             more: str) -> Iterator[Job]:
    """Runs that validate. methods: name -> values of q. variants: name -> options."""
    cells = itertools.product(variants.items(), methods.items(), SEEDS)
    for (variant, options), (method, qs), seed in cells:
        for q in qs:
            yield (f"{method} {variant} q={q:g} seed={seed}",
                   f"{LAB} --batch-size 4 --data {data} --start {start} --method {method} "
                   f"--q {q:g} {options} {more} --eval-limit 24 --seed {seed}")


def noisy(share: int, variant: str, qs: tuple, options: str = "", form: str = "") -> list[Job]:
    """GARL on 100 training rows, of which `share` have a wrong gold answer."""
    return list(learning("cold", {"garl": qs}, {f"{variant}noise={share}%": options},
                         f"{WORK}/noise{share}{form}", "--lr 3e-4 --steps 80 --eval-every 20"))


def schedules() -> list[Job]:
    """Runs in which q falls from 1, and what they are to be compared with."""
    jobs = [job for share in NOISE for job in noisy(share, "1-to-0,", (1,), DECAY)]
    for share in (0, 30):
        jobs += noisy(share, "gate-8,", (1,))  # see `gated`
        jobs += noisy(share, "bracket,", (0, 0.75, 1), form="-bracket")
        jobs += noisy(share, "bracket,1-to-0,", (1,), DECAY, "-bracket")
        jobs += noisy(share, "bracket,gate-8,", (1,), form="-bracket")
    return jobs


# Rows of HotpotQA and MuSiQue with their supporting paragraphs. MODEL and OFFICIAL are
# environment variables: a model's folder, and one with hotpotqa/ and musique/ in it.
REAL = ("--rollout hf --dtype bfloat16 --model $MODEL --think-budget 32 --answer-budget 16 "
        "--M 8 --batch-size 4 --eval-limit 30 --token-budget 16384")
LONG = "--steps 60 --eval-every 20"


def real(name: str, start: str, methods: dict[str, tuple], seeds: tuple, variant: str = "lr=5e-5",
         options: str = f"--lr 5e-5 {LONG}") -> Iterator[Job]:
    """Runs of a language model on a benchmark; the method "base" only evaluates it."""
    for seed, (method, qs) in itertools.product(seeds, methods.items()):
        for q in qs:
            data = f"--data {name}-gold:$OFFICIAL/{name} --start {start} --seed {seed}"
            chosen = f"--method {method} --q {q:g} {options}" if method != "base" else "--steps 0"
            yield f"{method} {start},{variant} q={q:g} seed={seed}", f"{REAL} {data} {chosen}"


def after_garl(seed: int) -> Iterator[Job]:
    """GRPO from the checkpoint that GARL has after 20 steps."""
    model = WORK / "hotpotqa" / f"garl_cold,20-steps_q=0.75_seed={seed}" / "last"
    for name, command in real("hotpotqa", "cold", {"grpo": (0,)}, (seed,), "after-garl",
                              "--lr 5e-5 --steps 40 --eval-every 20"):
        yield name, command.replace("$MODEL", str(model))


def tables() -> dict[str, list[Job]]:
    """Table -> its runs."""
    cold = {"grpo": (0,), "garl": (0, 0.25, 0.5, 0.75, 1)}
    warm = {"grpo": (0,), "garl": (0, 0.25, 0.75, 1), "paft": (0, 0.25, 0.75, 1),
            "garl-score": (0.75,)}
    rates = {f"sgd-{lr}": f"--optimizer sgd --lr {lr}" for lr in (0.03, 0.1, 0.3, 1, 3)}
    optimizers = {"adamw": "--lr 3e-4", "sgd": "--optimizer sgd --lr 0.3"}
    warm_rates = {f"lr={lr}": f"--lr {lr}" for lr in ("3e-4", "1e-3", "3e-3")}
    short = "--steps 48 --eval-every 16"
    real_cold = {"base": (0,), "garl": (0.75, 0, 1), "paft": (0.75, 1)}
    real_warm = {"base": (0,), "grpo": (0,), "garl": (0.25, 0.75), "paft": (0.25, 0.75)}
    musique = {"base": (0,), "grpo": (0,), "garl": (0.75,), "paft": (0.75,)}
    high = {"garl": (0.25, 0.75), "paft": (0.25, 0.75)}
    return {
        "gate": [*gate("garl", OPTIMIZERS), *gate("paft", {"adamw-1e-8": ""})],
        "rate": list(learning("cold", {"garl": (1,)}, rates, "ledger", short)),
        "cold": list(learning("cold", cold, optimizers, "ledger", short)),
        "warm": list(learning("warm", warm, warm_rates, "ledger", short)),
        "noise": [job for share in NOISE for job in noisy(share, "", (0, 0.5, 0.75, 1))],
        "schedule": schedules(),
        "hotpotqa": [
            *real("hotpotqa", "cold", real_cold, SEEDS),
            *real("hotpotqa", "cold", {"grpo": (0,)}, SEEDS,
                  options="--lr 5e-5 --steps 120 --eval-every 20"),
            *real("hotpotqa", "warm", real_warm, SEEDS),
            *real("hotpotqa", "cold", {"garl": (0,)}, SEEDS, "eps=1e-20",
                  f"--lr 5e-5 --eps 1e-20 {LONG}"),
            *real("hotpotqa", "warm", high, (0,), "lr=1.5e-4", f"--lr 1.5e-4 {LONG}"),
            *real("hotpotqa", "cold", {"garl": (0.25, 0.5, 1)}, (0,), "12-steps",
                  "--lr 5e-5 --steps 12 --eval-every 12"),
            *real("hotpotqa", "cold", {"garl": (0.75,)}, SEEDS, "20-steps",
                  "--lr 5e-5 --steps 20 --eval-every 20"),
            *(job for seed in SEEDS for job in after_garl(seed)),
        ],
        "musique": list(real("musique", "cold", musique, (0, 1))),
    }


# --- 2. Their data --------------------------------------------------------------------
def write_rows(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_wrong_golds(rows: list[dict], share: int) -> list[dict]:
    """The first `share` rows, each with the answer of another row. No wrong answer contains
    the right one or is contained in it."""
    rng = random.Random(0)
    answers = [row["answer"] for row in rows]
    wrong = lambda y: [other for other in answers if y not in other and other not in y]
    return [row | {"answer": rng.choice(wrong(row["answer"]))} for row in rows[:share]]


def make_data() -> None:
    """Make the data sets that the commands name, below runs/study, where they are missing.

    FORMS are ledger with colder answers. noiseN is ledger with 100 training rows, N of them
    with a wrong gold answer. Its test split holds the wrong rows (or without noise all 100),
    so that accuracy on it is the share of wrong answers that was learned by heart.
    """
    for name, form in FORMS.items():
        if not (WORK / name / "test.jsonl").exists():
            make = [sys.executable, ROOT / "data" / "ledger" / "make.py"]
            subprocess.run([*make, f"--form={form}", "--out", WORK / name], check=True)
    sources = {"": ROOT / "data" / "ledger", "-bracket": WORK / "bracket"}
    for share, (form, source) in itertools.product(NOISE, sources.items()):
        folder = WORK / f"noise{share}{form}"
        rows = [row for _, row in read_jsonl(source / "train.jsonl")][:100]
        wrong = with_wrong_golds(rows, share)
        write_rows(folder / "train.jsonl", wrong + rows[share:])
        write_rows(folder / "test.jsonl", wrong or rows)
        shutil.copy(source / "validation.jsonl", folder)


# --- 3. Running them ------------------------------------------------------------------
COLUMNS = ("q", "log_P", "loss", "reward", "ess", "grad_norm", "above_eps", "rationale_tokens",
           "val_p@1", "val_p@16", "val_maj@16")


def columns(path: Path, names: tuple[str, ...] = COLUMNS) -> dict[str, list]:
    """The columns of a metrics.jsonl, with four digits. Empty columns are left out."""
    rows = read_log(path)
    short = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
    table = {name: [short(row.get(name)) for row in rows] for name in names}
    return {name: xs for name, xs in table.items() if any(x is not None for x in xs)}


def read(table: str) -> list[dict]:
    """The runs of a table, [] if there are none. Older logs call log_P log_P_mean."""
    lines = read_log(RESULTS / f"{table}.jsonl")
    for line in lines:
        metrics = line["metrics"]
        if "log_P_mean" in metrics:
            metrics["log_P"] = metrics.pop("log_P_mean")
    return lines


def first(values: list) -> float:
    """The first value that was measured. It is that of the start: in row 0 of older logs, and
    in row 1 of newer ones, where step 0 only validates. No weight has moved before either."""
    return next(x for x in values if x is not None)


@contextlib.contextmanager
def gated(c: float) -> Iterator[None]:
    """Inside, q is not --q but max(0, 1 - c / |log P|), with a running mean of the steps' log P.
    The gate (section 4) suggests this schedule. It did not earn an option."""
    import tsallis_rl as t
    q_of, train_step, log_P = t.q_of, t.train_step, None

    def watched(run, step: int) -> dict:
        nonlocal log_P
        row = train_step(run, step)
        log_P = row["log_P"] if log_P is None else 0.8 * log_P + 0.2 * row["log_P"]
        return row

    def scheduled(step: int, config) -> float:
        return 1.0 if log_P is None else max(0.0, 1 - c / max(1e-9, -log_P))

    t.train_step, t.q_of = watched, scheduled
    try:
        yield
    finally:
        t.train_step, t.q_of = train_step, q_of


def load_engine(config, model: str, records: list):
    """A checkpoint as a sampler, and the records with their prompts."""
    import tsallis_rl as t
    network, template = t.load_model(model, t.start_processes())
    examples = t.encode(records, config, template, network, training=False)
    return t.HFRollouts(network, template, config), examples


def answer(config, model: str, records: list) -> list:
    """16 sampled answers to each record."""
    import tsallis_rl as t
    config = replace(config, eval_samples=16)
    return t.sample_answers(*load_engine(config, model, records), config)


def evaluate(command: str, model: str) -> dict:
    """p@1, p@16 and maj@16 of a checkpoint on (at most) 100 rows of the test split."""
    import tsallis_rl as t
    from data import load
    from data.verifiers import summarize
    config = t.parse(command.split())
    records = load(config.data, "test", 100)
    return summarize(answer(config, model, records), records)


def train(table: str, name: str, command: str, out: Path) -> int:
    """Train in this process, silently. Returns the exit code."""
    import tsallis_rl as t
    shutil.rmtree(out, ignore_errors=True)
    schedule = gated(8) if "gate-8," in name else contextlib.nullcontext()
    with open(os.devnull, "w") as null, schedule, contextlib.redirect_stdout(null), \
            contextlib.redirect_stderr(null):
        return exit_code(lambda: t.main([*command.split(), "--out", str(out)]))


def run_one(job: tuple[str, str, str]) -> dict:
    """One run, in this process, and what its best checkpoint does."""
    import torch
    torch.set_num_threads(1)
    table, name, command = job
    out, start = WORK / table / name.replace(" ", "_"), time.perf_counter()
    line = {"run": name, "command": f"OMP_NUM_THREADS=1 python tsallis_rl.py {command}"}
    if "gate-8," in name:
        line["command"] = f"python data/results/study.py {table} --only '{name}'"
    command = os.path.expandvars(command)
    line["exit"] = code = train(table, name, command, out)
    line["seconds"] = round(time.perf_counter() - start, 1)
    if code == 0 and table in ("hotpotqa", "musique"):
        line |= evaluate_real(command, out)
    elif code == 0 and table != "gate":
        line["test"] = evaluate(command, str(out / "best"))
    gpu = torch.cuda.is_available()
    line["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000
    line["peak_GB"] = round((torch.cuda.max_memory_allocated() if gpu else resident) / 1e9, 2)
    steps = [row["seconds_rollout"] + row["seconds_train"]
             for row in read_log(out / "metrics.jsonl") if "seconds_train" in row]
    line["step_seconds"] = round(fmean(steps), 2) if steps else None
    names = ("log_P", "above_eps") if table == "gate" else COLUMNS
    line["metrics"] = columns(out / "metrics.jsonl", names)
    if table == "gate":
        shutil.rmtree(out, ignore_errors=True)
    return line


def run_tables(todo: list[tuple[str, str, str]], jobs: int) -> None:
    """The runs (table, name, command) that are not logged yet, `jobs` at a time, each in a
    process and on a thread of its own."""
    done = {table: {line["run"] for line in read(table)} for table, *_ in todo}
    todo = [job for job in todo if job[1] not in done[job[0]]]
    # a run that starts from another one's checkpoint comes after all others
    later = [job for job in todo if f"--model {WORK}" in job[2]]
    for batch in ([job for job in todo if job not in later], later):
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
            for i, (job, line) in enumerate(zip(batch, pool.imap(run_one, batch)), 1):
                append_jsonl(RESULTS / f"{job[0]}.jsonl", [line])
                print(f"{i}/{len(batch)} {job[0]} {line['run']}: {line['seconds']} s", flush=True)


# What is asked of a language model on real rows: how often it is right, and whether it is the
# rationale that makes the answer likely.
def held_out(config) -> list:
    """The rows that no choice was made on: the rest of the validation split, and the test split."""
    from data import load
    return load(config.data, "validation")[config.eval_limit:] + load(config.data, "test")


def grade(answers: list, records: list, dataset: str) -> dict[str, list[float]]:
    """A value for each record: by the paper's rule p@1, p@16, maj@16; of the majority's answer
    also the exact match and the official EM and F1."""
    from data.verifiers import majority_vote, verdicts
    rows = defaultdict(list)
    for samples, record in zip(answers, records):
        judge = lambda answer: verdicts(dataset, answer, record.answer, record.aliases)
        right = [judge(answer)["paper"] for answer in samples or [""]]
        vote = judge(majority_vote(samples or []))
        values = {"p@1": fmean(right), "p@16": max(right), "maj@16": vote["paper"],
                  "exact maj@16": vote["exact"], "em": vote["em"], "f1": vote["f1"]}
        for name, value in values.items():
            rows[name].append(round(value, 4))
    return dict(rows)


def evaluate_real(command: str, out: Path) -> dict:
    """The held-out rows with the best checkpoint. For seed 0 also with rationales of one token,
    and log P with the model's own rationales and with others, before and after."""
    import tsallis_rl as t
    from data import dataset_name
    config, best, lines = t.parse(command.split()), str(out / "best"), {}
    records, dataset = held_out(config), dataset_name(config.data)
    lines["rows"] = grade(answer(config, best, records), records, dataset)
    lines["test"] = {name: 100 * fmean(xs) for name, xs in lines["rows"].items()}
    if config.seed > 0:
        return lines
    short = replace(config, think_budget=1)
    lines["rows, 1 token"] = grade(answer(short, best, records), records, dataset)
    lines["log_P, start"] = swap_rationales(config, config.model)
    lines["log_P, end"] = swap_rationales(config, best)
    return lines


def with_rationales(config, model: str, records: list, count: int, n: int, key: str) -> tuple:
    """A checkpoint as a sampler, the first `count` records that fit with their prompts, and n
    rationales for each."""
    import tsallis_rl as t
    engine, examples = load_engine(config, model, records)
    examples = [(record, prompt) for record, prompt in examples if prompt][:count]
    seeds = [t.seed_of(config.seed, key, i) for i in range(count)]
    prompts = [prompt for _, prompt in examples]
    pools = t.generate(engine, prompts, seeds, n, config.think_budget, 0)
    return engine, examples, [[rollout.z for rollout in pool] for pool in pools]


def swap_rationales(config, model: str) -> dict[str, float]:
    """Means over 16 held-out rows: log P of the gold answer after four rationales of the model's
    own, after an empty one, and after four of the next row's; the share of the model's own
    rationales that contain the gold answer, in percent."""
    import tsallis_rl as t
    engine, examples, own = with_rationales(config, model, held_out(config), 16, 4, "swap")
    rows = defaultdict(list)
    for i, example in enumerate(examples):
        kinds = {"own": own[i], "empty": [[]], "another's": own[(i + 1) % len(own)]}
        for name, rationales in kinds.items():
            rows[name].append(t.log_mean(log_weights(engine, *example, rationales)).item())
        gold, texts = example[0].answer.lower(), [engine.template.text(z).lower() for z in own[i]]
        rows["gold in z"].append(100 * fmean(gold in text for text in texts))
    return {name: round(fmean(values), 2) for name, values in rows.items()}


def log_weights(engine, record, prompt: list[int], rationales: list):
    """log p(y* | x*, z) for each rationale z, (R,)."""
    import torch
    import tsallis_rl as t
    template, gold = engine.template, engine.template.gold(record.answer)
    rollouts = [t.Rollout(z, [0.0] * len(z), template.forced(z), gold) for z in rationales]
    group = t.Group(record, prompt, rollouts, None, 0)
    with torch.no_grad():
        shared = t.SharedPrompt(engine.model, prompt, engine.config)
        return t.score(shared, group, list(range(len(rollouts))), y_alone=True)[1].cpu()


def share() -> None:
    """Prints log P of 64 training rows of HotpotQA at the cold start (8 rationales each), and how
    much of a batch of four is its likeliest row: a row's gradient has the weight P^(1-q)."""
    import torch
    import tsallis_rl as t
    from data import load
    command = dict(tables()["hotpotqa"])["garl cold,lr=5e-5 q=0 seed=0"]
    config = t.parse(os.path.expandvars(command).split())
    rows = load(config.data, "train")
    engine, *pairs = with_rationales(config, config.model, rows, 64, config.M, "share")
    log_w = torch.stack([log_weights(engine, *example, own) for example, own in zip(*pairs)])
    log_P = t.log_mean(log_w.double())[:, 0]
    low, high = log_P.min(), log_P.max()
    print(f"log P of {len(log_P)} rows: mean {log_P.mean():.1f}, {low:.1f} to {high:.1f}")
    torch.manual_seed(config.seed)
    batches = log_P[torch.rand(2000, len(log_P)).argsort()[:, :4]]
    for q in (0, 0.25, 0.5, 0.75, 1):
        largest = ((1 - q) * batches).softmax(1).amax(1)
        print(f"q = {q:g}: the likeliest of four has {100 * largest.median():.0f}% of the weight")


# --- 4. When a start is passed --------------------------------------------------------
# GARL's gradient of weight i is s g_i. Here g is the gradient at q = 1, which is
# grad log P / M, and s = (M P)^(1-q). AdamW divides the gradient by its own size, so s
# cancels as long as the gradient is above eps (or above about 1e-21, whose square float32
# no longer holds). log P then rises by
#
#     lr M sum_i |g_i| s |g_i| / (s |g_i| + eps)                                   a step
#
# This is the full rate, whatever q is, while
#
#     (1 - q) (|log P0| - log M) < log(g1 / eps)       half of the sum of |g| is in weights
#                                                      above g1
#
# and next to nothing beyond. Under SGD log P rises by lr M s |g|^2 a step. With g held as it
# is at the start, the steps can be summed up to a predicted step of escape.
def predict() -> None:
    """log P0 and the distribution of |g| of each form, to data/results/gate-line.json."""
    import torch
    make_data()
    jobs, line = dict(gate("garl", {"adamw-1e-8": ""})), {}
    shares = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)  # of the sum of |g|
    for form in FORMS:
        starts = [start_of(jobs[f"garl {form} adamw-1e-8 q=1 seed={seed}"]) for seed in SEEDS]
        g = torch.stack([g for _, g in starts]).mean(0)  # by rank
        at = torch.searchsorted(g.cumsum(0) / g.sum(), shares)
        line[form] = {"log_P0": fmean(log_P for log_P, _ in starts), "sum": g.sum().item(),
                      "squares": g.square().sum().item(), "g": g[at].tolist()}
    (RESULTS / "gate-line.json").write_text(json.dumps(line) + "\n")


def start_of(command: str):
    """The mean log P of the first step's prompts, and |gradient| of all weights, sorted."""
    import torch
    import tsallis_rl as t
    from data import load
    config = t.parse(command.split())
    engine, examples = load_engine(config, config.model, load(config.data, "train", config.limit))
    run = t.Run(config, WORK, engine.model, engine, None, examples, [])
    groups = t.sample_groups(run, 1)
    rows = [t.group_gradient(engine.model, group, config)[1] for group in groups]
    g = torch.cat([p.grad.abs().flatten() for p in engine.model.parameters()])
    return fmean(row["log_P"] for row in rows), g.double().sort().values


def epsilon(optimizer: str) -> float:
    """AdamW's eps, from "adamw-1e-8"; at least what float32 can square."""
    return max(float(optimizer.removeprefix("adamw-")), 1e-21)


def reach(optimizer: str, start: dict) -> float:
    """How far AdamW reaches, in nats: log(g1 / eps)."""
    return math.log(start["g"][50] / epsilon(optimizer))


def predicted(optimizer: str, start: dict, q: float, M: int = 16, steps: int = 1000) -> int | None:
    """The step at which log P has come half of its way to 0. None: not within `steps`."""
    log_P = start["log_P0"]
    for step in range(1, steps + 1):
        s, warmup = math.exp((1 - q) * (log_P + math.log(M))), min(1, step / 5)
        if optimizer == "sgd":
            norm = s * start["squares"]**0.5  # is clipped at 1
            rate = 0.1 * M * s * start["squares"] / max(1, norm)
        else:
            eps = epsilon(optimizer)
            rate = 3e-4 * M * start["sum"] * fmean(s * g / (s * g + eps) for g in start["g"])
        log_P += warmup * rate
        if log_P > start["log_P0"] / 2:
            return step
    return None


def escape(line: dict, window: int = 1) -> int | None:
    """The first step at which log P is half of the way from its start to 0. None: never. window:
    how many steps are averaged, because on real rows log P differs from batch to batch."""
    points = [(step, x) for step, x in enumerate(line["metrics"]["log_P"]) if x is not None]
    means = [(points[end - 1][0], fmean(x for _, x in points[end - window:end]))
             for end in range(window, len(points) + 1)]
    half = means[0][1] / 2 if means else 0
    return next((step for step, mean in means if mean > half), None)


def median(steps: list) -> int | None:
    """The median of steps, where None comes last."""
    return sorted(steps, key=lambda step: math.inf if step is None else step)[len(steps) // 2]


def gate_cells() -> dict[tuple, list]:
    """(method, optimizer, form, q) -> the seeds' steps of escape."""
    cells = defaultdict(list)
    for line in read("gate"):
        method, form, optimizer, q, _ = line["run"].split()
        cells[method, optimizer, form, float(q[2:])].append(escape(line))
    return cells


# --- 5. The variance of the estimators ------------------------------------------------
def variance() -> None:
    """Gradients from M rollouts beside GARL's from 2,048, to data/results/variance.json.

    For 32 pools of M: the mean cosine with the large sample's gradient, the mean length over
    its length, and the length of the pools' mean, in which the variance is a 32nd. Without the
    factor M^q.
    """
    import torch
    import tsallis_rl as t
    from data import load
    rows = []
    for start in ("warm", "cold"):
        config = t.parse([*LAB.split(), "--start", start, "--batch-size", "1"])
        engine, examples = load_engine(config, config.model, load("ledger", "train", 2))
        model = engine.model
        for i, (record, prompt) in enumerate(examples):
            [pool] = t.generate(engine, [prompt], [t.seed_of("variance", i)], 2048, 24, 0)
            gold = engine.template.gold(record.answer)
            pool = [rollout._replace(y=gold) for rollout in pool]

            def gradient(method: str, q: float, M: int, at: int) -> torch.Tensor:
                group = t.Group(record, prompt, pool[at:at + M], None, t.seed_of("pool", at))
                model.zero_grad()
                t.group_gradient(model, group, replace(config, method=method, q=q, M=M, K=M))
                return torch.cat([p.grad.flatten() for p in model.parameters()]) * M**q

            about = {"start": start, "prompt": i}
            rows += [about | row for q in (0, 0.5, 0.75, 1) for row in compare(gradient, q)]
    (RESULTS / "variance.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]\n")


def compare(gradient, q: float) -> Iterator[dict]:
    """The rows of `variance` for one prompt and one q."""
    import torch
    true = gradient("garl", q, 2048, 0)
    for method, M in itertools.product(("garl", "paft"), (2, 8, 32)):
        pools = torch.stack([gradient(method, q, M, M * k) for k in range(32)])
        lengths = pools.norm(dim=-1) / true.norm()
        mean = pools.mean(0).norm() / true.norm()
        values = {"cosine": torch.cosine_similarity(pools, true[None], -1).mean(),
                  "length": lengths.mean(), "length of the mean": mean}
        yield ({"method": method, "q": q, "M": M}
               | {name: round(value.item(), 3) for name, value in values.items()})


# --- 6. Tables ------------------------------------------------------------------------
def print_row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def print_head(*names: str) -> None:
    print_row(*names)
    print("|---" * len(names) + "|")


def spread(values: list[float], form: str = ".0f") -> str:
    """The mean and the range over the seeds."""
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "-"
    low, high = min(values), max(values)
    return f"{fmean(values):{form}} ({low:{form}} to {high:{form}})"


def print_gate() -> None:
    """The median step of escape beside the predicted one, and how often they agree."""
    start = json.loads((RESULTS / "gate-line.json").read_text())
    cells, right = gate_cells(), defaultdict(list)
    print("\ngate: median step of escape / predicted; reach: log(g1 / eps)\n")
    print_head("method", "optimizer", "log P0", "reach", *(f"q = {q:g}" for q in QS))
    order = lambda key: (*key[:2], -start[key[2]]["log_P0"])
    for method, optimizer, form in sorted({key[:3] for key in cells}, key=order):
        log_P0, row = start[form]["log_P0"], []
        limit = math.nan if optimizer == "sgd" else reach(optimizer, start[form])
        for q in QS:
            seen = median(cells[method, optimizer, form, q])
            told = predicted(optimizer, start[form], q)
            row.append(f"{seen or 'flat'} / {told or 'never'}")
            passes = told is not None and told <= 40
            right["all by steps"].append((seen is not None) == passes)
            if optimizer != "sgd":
                below = (1 - q) * (-log_P0 - math.log(16)) < limit
                right["all by line"].append((seen is not None) == below)
        print_row(method, optimizer, f"{log_P0:.0f}", f"{limit:.1f}", *row)
    for rule, hits in right.items():
        print(f"{rule}: {sum(hits)} of {len(hits)} cells")


def by_variant(table: str) -> dict[str, list[dict]]:
    """The name of a run without its seed -> its runs, in the order of `tables`."""
    place = {name: i for i, (name, _) in enumerate(tables()[table])}
    groups = defaultdict(list)
    for line in sorted(read(table), key=lambda line: place.get(line["run"], 0)):
        groups[line["run"].rsplit(" seed", 1)[0]].append(line)
    return groups


def validation(lines: list[dict]) -> list[list[float]]:
    """The seeds' validation maj@16: a list for each validation."""
    columns = [[x for x in line["metrics"]["val_maj@16"] if x is not None] for line in lines
               if "val_maj@16" in line["metrics"]]
    return list(zip(*columns))


def print_learning(table: str) -> None:
    """A row per method, variant and q: validation, then the best checkpoint on held-out rows."""
    rows = "the noisy training rows" if table in ("noise", "schedule") else "test"
    print(f"\n{table}: means and ranges of the seeds; p@1, p@16, maj@16 on {rows}\n")
    print_head("run", "last log P", "validation maj@16: means by step", "last", "p@1", "p@16",
               "maj@16")
    for name, lines in by_variant(table).items():
        steps = validation(lines)
        log_P = [line["metrics"]["log_P"][-1] for line in lines if "log_P" in line["metrics"]]
        test = [spread([line["test"][key] for line in lines if "test" in line])
                for key in ("p@1", "p@16", "maj@16")]
        print_row(name, spread(log_P, ".1f"), ", ".join(f"{fmean(at):.0f}" for at in steps),
                  spread(steps[-1]), *test)


def gain(lines: list[dict], base: list[dict]) -> str:
    """maj@16 over that of the base model, with a 95% interval from resampled rows. The seeds are
    averaged row by row."""
    from data.verifiers import bootstrap_interval
    means = [[fmean(row) for row in zip(*(line["rows"]["maj@16"] for line in some))]
             for some in (lines, base)]
    differences = [100 * (ours - theirs) for ours, theirs in zip(*means)]
    if not differences:
        return "-"
    low, high = bootstrap_interval(differences)
    return f"{fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}]"


def print_real(table: str) -> None:
    """A row per method and variant of a language model on real rows."""
    print(f"\n{table}: percent of held-out rows, best checkpoint; means and ranges of the seeds\n")
    names = ("p@1", "p@16", "maj@16", "exact maj@16", "em", "f1")
    print_head("run", "validation maj@16: means by step", *names, "maj@16 over base",
               "log P start", "log P end", "half way at step", "gradient's norm", "tokens",
               "minutes", "GB")
    groups = by_variant(table)
    for name, lines in groups.items():
        start = name.split()[1].split(",")[0]
        base = groups.get(f"base {start},lr=5e-5 q=0", [])
        tests = [spread([line["test"][key] for line in lines]) for key in names]
        metrics = [line["metrics"] for line in lines]
        log_P = [m["log_P"] for m in metrics if "log_P" in m]
        tokens = [m["rationale_tokens"][-1] for m in metrics if "rationale_tokens" in m]
        half = [escape(line, 5) or "never" for line in lines if "log_P" in line["metrics"]]
        norms = [x for m in metrics for x in m.get("grad_norm", ()) if x is not None]
        steps = ", ".join(f"{fmean(at):.0f}" for at in validation(lines))
        print_row(name, steps, *tests, gain(lines, base), spread([first(x) for x in log_P], ".1f"),
                  spread([x[-1] for x in log_P], ".1f"), ", ".join(map(str, half)),
                  f"{min(norms):.0e} to {max(norms):.0e}" if norms else "-", spread(tokens),
                  spread([line["seconds"] / 60 for line in lines]),
                  spread([line["peak_GB"] for line in lines], ".1f"))
    print("\nseed 0: log P after own, empty and another's z; gold in z: percent of own ones\n")
    kinds = ("own", "empty", "another's", "gold in z")
    print_head("run", *(f"{kind}, start" for kind in kinds), *(f"{kind}, end" for kind in kinds),
               "maj@16, z of 1 token")
    for name, lines in groups.items():
        for line in (line for line in lines if "rows, 1 token" in line):
            cells = [line[f"log_P, {at}"][kind] for at in ("start", "end") for kind in kinds]
            print_row(name, *cells, f"{100 * fmean(line['rows, 1 token']['maj@16']):.1f}")


def print_variance() -> None:
    """Means over the two prompts."""
    groups = defaultdict(list)
    for row in json.loads((RESULTS / "variance.json").read_text()):
        key = row["start"], row["method"], row["q"], row["M"]
        groups[key].append((row["cosine"], row["length"], row["length of the mean"]))
    print("\nvariance: gradients from M rollouts beside that from 2,048\n")
    print_head("start", "method", "q", "M", "cosine", "length", "length of the mean")
    for key, values in groups.items():
        print_row(*key, *(f"{fmean(column):.2f}" for column in zip(*values)))


# --- 7. Figures -----------------------------------------------------------------------
# A panel: table, title, and at most three curves (name of the run without its seed -> label).
PANELS = [
    ("hotpotqa", "HotpotQA: cold start, 135M model",
     {"grpo cold,lr=5e-5 q=0": "GRPO", "garl cold,lr=5e-5 q=0.75": "GARL q = 0.75",
      "paft cold,lr=5e-5 q=0.75": "PAFT q = 0.75"}),
    ("cold", "Ledger: cold start, plain SGD",
     {f"garl sgd q={q}": f"GARL q = {q}" for q in ("0", "0.5", "1")}),
    ("noise", "Ledger: 30% wrong golds",
     {f"garl noise=30% q={q}": f"GARL q = {q}" for q in ("0", "0.75", "1")}),
    ("warm", "Ledger: warm start, rate 1e-3",
     {"grpo lr=1e-3 q=0": "GRPO", "garl lr=1e-3 q=0.75": "GARL q = 0.75",
      "paft lr=1e-3 q=0.75": "PAFT q = 0.75"}),
]
COLORS = {"GRPO": "black", "GARL q = 0": "C0", "GARL q = 0.5": "C2", "GARL q = 0.75": "C3",
          "GARL q = 1": "C4", "PAFT q = 0.75": "C1"}


def apart(heights: list[float], gap: float) -> list[float]:
    """Heights for labels: near the given ones, and none within `gap` of another."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for below, i in zip(order, order[1:]):
        placed[i] = max(placed[i], placed[below] + gap)
    excess = max(0, placed[order[-1]] - max(heights) - gap / 2)  # keep the top near its curve
    return [height - excess for height in placed]


def learning_figure(pyplot) -> None:
    """learning.png: validation maj@16 over the steps, with the range of the seeds."""
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.3), layout="constrained")
    for axis, (table, title, curves) in zip(axes, PANELS):
        groups, ends = by_variant(table), []
        for name, label in ((n, label) for n, label in curves.items() if n in groups):
            column = groups[name][0]["metrics"]["val_maj@16"]
            steps = [step for step, x in enumerate(column) if x is not None]
            at, color = validation(groups[name]), COLORS[label]
            axis.plot(steps, [fmean(x) for x in at], "o-", color=color, lw=2, ms=4)
            low, high = [min(x) for x in at], [max(x) for x in at]
            axis.fill_between(steps, low, high, alpha=0.12, color=color, lw=0)
            ends.append((label, steps[-1], fmean(at[-1]), color))
        top = 103 if table != "hotpotqa" else None
        axis.set(title=title, xlabel="step", ylim=(-3, top))
        gap = 0.07 * (axis.get_ylim()[1] + 3)
        heights = apart([end for *_, end, _ in ends], gap)
        for (label, step, _, color), height in zip(ends, heights):
            axis.annotate(label, (step, height), (6, 0), textcoords="offset points",
                          color=color, va="center", annotation_clip=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="correct by majority of 16 (%)\nline: mean of three seeds, band: range")
    figure.savefig(RESULTS / "learning.png", dpi=110)


def real_figure(pyplot) -> None:
    """real.png: log P and above_eps over the steps of GARL on HotpotQA, cold, seed 0."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    runs = {line["run"]: line["metrics"] for line in read("hotpotqa")}
    for q, color in zip(("0", "0.25", "0.5", "0.75", "1"), ("C0", "C9", "C2", "C3", "C4")):
        names = (f"garl cold,{variant} q={q} seed=0" for variant in ("lr=5e-5", "12-steps"))
        metrics = next((runs[name] for name in names if name in runs), {})
        for axis, name in zip(axes, ("log_P", "above_eps")):
            column = metrics.get(name, ())[:21]  # the start, where they differ
            points = [(i, x) for i, x in enumerate(column) if x is not None]
            if points:
                axis.plot(*zip(*points), color=color, label=f"q = {q}")
            axis.set(xlabel="step")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(title="mean log P of the step's prompts")
    axes[1].set(title="share of weights with a gradient above eps", ylim=(0, 1))
    axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(RESULTS / "real.png", dpi=100)


def gate_figure(pyplot) -> None:
    """gate.png: a mark for each run, and the predictions made from the first step."""
    start, cells = json.loads((RESULTS / "gate-line.json").read_text()), gate_cells()
    pairs = list(dict.fromkeys(key[:2] for key in cells))
    size = (3.3 * len(pairs), 3.8)
    figure, axes = pyplot.subplots(1, len(pairs), figsize=size, layout="constrained", sharey=True)
    qs, typical = [i / 100 for i in range(101)], start["bracket"]
    for axis, (method, optimizer) in zip(axes, pairs):
        for (*pair, form, q), steps in cells.items():
            for i, step in enumerate(steps if (method, optimizer) == tuple(pair) else ()):
                look = dict(marker="x", c="black")
                if step is not None:
                    look = dict(c=[step], cmap="viridis", vmin=5, vmax=40)
                mark = axis.scatter(q + 0.03 * (i - 1), -start[form]["log_P0"], s=24, **look)
                colored = mark if step is not None else colored
        stays = lambda q, y: predicted(optimizer, typical | {"log_P0": -y}, q, steps=40) is None
        edge = [next((y for y in range(1, 100) if stays(q, y)), 100) for q in qs]
        axis.plot(qs, edge, c="crimson", label="predicted: 40 steps")
        if optimizer != "sgd":
            far = [math.log(16) + reach(optimizer, typical) / max(1e-9, 1 - q) for q in qs]
            axis.plot(qs, far, "--", c="crimson", label="(1 - q)(|log P| - log M) = log(g1 / eps)")
        axis.set(xlabel="q", title=f"{method.upper()}, {optimizer}", ylim=(0, 95))
    axes[0].set(ylabel="|log P| at the start (nats)")
    axes[0].legend(loc="upper left", fontsize=7)
    figure.colorbar(colored, ax=axes, label="step of escape (x: none in 40)")
    figure.savefig(RESULTS / "gate.png", dpi=110)


def escape_time(p0: float, q: float, delta: float = 0.5, n: int = 2000) -> float:
    """T_q (15): the integral of du / (u^(2-q) (1-u)^2) from p0 to delta. It is summed over
    x = log u, in which du = u dx, by the trapezoidal rule."""
    h = (math.log(delta) - math.log(p0)) / n
    u = [p0 * math.exp(i * h) for i in range(n + 1)]
    f = [x**(q - 1) / (1 - x)**2 for x in u]
    return h * (sum(f) - (f[0] + f[-1]) / 2)


def family_figure(pyplot) -> None:
    """family.png: the loss, the weight of the RL gradient, and the time to leave a cold start."""
    import torch
    from tsallis_rl import tsallis_loss
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.3), layout="constrained")
    log_P = torch.linspace(-7, 0, 200, dtype=torch.float64)
    starts = [10**(-k / 4) for k in range(4, 33)]
    for q, color in zip((0, 0.25, 0.5, 0.75, 1), ("C0", "C9", "C2", "C3", "C4")):
        look = dict(color=color, label=f"q = {q:g}", lw=2)
        axes[0].plot(log_P.exp(), tsallis_loss(log_P, q), **look)
        axes[1].loglog(starts, [p**-q for p in starts], **look)
        axes[2].loglog(starts, [escape_time(p, q) for p in starts], **look)
    axes[0].set(title=r"Loss $\ell_q = (1 - P^{1-q}) / (1 - q)$", xlabel="P", ylim=(0, 4.5))
    axes[1].set(title=r"Weight of the RL gradient, $P^{-q}$", xlabel="P")
    axes[2].set(title=r"Time from $p_0$ to $P = 1/2$ (eq. 15)", xlabel=r"$p_0$")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "family.png", dpi=100)


def figures() -> None:
    """All tables to the terminal, all figures to data/results."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    for table in tables():
        if read(table) and table == "gate":
            print_gate()
        elif read(table):
            (print_real if table in ("hotpotqa", "musique") else print_learning)(table)
    print_variance()
    family_figure(pyplot)
    gate_figure(pyplot)
    learning_figure(pyplot)
    if read("hotpotqa"):
        real_figure(pyplot)


# --- 8. Main --------------------------------------------------------------------------
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    known = ["data", "predict", "variance", "share", *tables()]
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(known))
    parser.add_argument("--only", default="", help="only runs with all these words in the name")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--model", help="of real rows: folder of SmolLM2-135M-Instruct")
    parser.add_argument("--official", help="of real rows: folder with the official files")
    parser.add_argument("--figures", action="store_true", help="print tables, draw figures")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(known):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    of_real_rows = {"share", "hotpotqa", "musique"}
    if of_real_rows & set(given.tables) and not (given.model and given.official):
        parser.error(f"{', '.join(sorted(of_real_rows))} need --model and --official")
    if given.model and given.official:
        os.environ |= {"MODEL": os.path.abspath(given.model),
                       "OFFICIAL": os.path.abspath(given.official)}
    os.chdir(ROOT)
    if given.tables:
        make_data()
    for name, measure in (("predict", predict), ("variance", variance), ("share", share)):
        if name in given.tables:
            measure()
    todo = [(table, *job) for table in given.tables for job in tables().get(table, ())]
    words = given.only.split()
    run_tables([job for job in todo if all(w in job[1].split() for w in words)], given.jobs)
    if given.figures:
        figures()


if __name__ == "__main__":
    main()
