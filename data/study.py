"""The laboratory study behind "What we found" in README.md: every run on `ledger`, its logs, tables and figures.

    python data/study.py gate cold warm noise --jobs 2     # run what is not yet in data/results/: hours on two cores
    python data/study.py real --model SMOLLM2 --official DIR   # SmolLM2-135M-Instruct on rows of the benchmarks
    python data/study.py --figures                         # data/figures/*.png and the tables, from data/results/

A line of data/results/TABLE.jsonl is one run: its command, which repeats it, the columns of its metrics.jsonl, and
what `eval.py --split test` says of its best checkpoint. Data sets that commands name are made first, below runs/study.

Contents: 1 the tables, 2 running them, 3 the gate's line, 4 tables and figures, 5 main.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS, FIGURES, WORK = ROOT / "data" / "results", ROOT / "data" / "figures", Path("runs", "study")

# ---------------------------------------------------------------------------------------------------------------------
# 1. The tables: name -> command line of a run, and the data sets that they name
# ---------------------------------------------------------------------------------------------------------------------
SEEDS = (0, 1, 2)
QS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
FORMS = {"plain": "N", "one": "[N", "two": "[[N]", "three": "[[[N]]]"}  # the model never writes a bracket
OPTIMIZERS = {"adamw-1e-8": "", "adamw-1e-20": "--eps 1e-20", "sgd": "--optimizer sgd --lr 0.1"}
LAB = "--rollout hf --model data/ledger/model --think-budget 24 --answer-budget 8 --batch-size 4 --M 16"
NOISE = (0, 10, 30)


def gate(method: str, optimizers: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Where a start is passed: cold, 40 steps, answers of four forms."""
    for form in FORMS:
        for optimizer, options in optimizers.items():
            for q in QS:
                for seed in SEEDS:
                    yield (f"{method} {form} {optimizer} q={q:g} seed={seed}",
                           f"{LAB} --data {WORK}/{form} --start cold --method {method} --q {q:g} --steps 40 --lr 3e-4 "
                           f"--eval-every 40 --eval-limit 1 --eval-samples 1 {options} --seed {seed}")


def learning(start: str, methods: dict[str, tuple], options: dict[str, str], data: str, more: str) -> Iterator:
    """Runs with validation: methods name -> its values of q."""
    for variant, option in options.items():
        for method, qs in methods.items():
            for q in qs:
                for seed in SEEDS:
                    yield (f"{method} {variant} q={q:g} seed={seed}",
                           f"{LAB} --data {data} --start {start} --method {method} --q {q:g} {option} {more} "
                           f"--eval-every 20 --eval-limit 50 --seed {seed}")


def tables() -> dict[str, list[tuple[str, str]]]:
    """Table -> its runs."""
    cold = {"grpo": (0,), "garl": (0, 0.25, 0.5, 0.75, 1)}
    warm = {"grpo": (0,), "garl": (0, 0.25, 0.75, 1), "paft": (0, 0.25, 0.75, 1), "garl-score": (0.75, 1)}
    noise = [run for share in NOISE for run in learning(
        "cold", {"garl": (0, 0.5, 0.75, 1)}, {f"noise={share}%": ""}, f"{WORK}/noise{share}", "--lr 3e-4 --steps 120")]
    return {
        "gate": [*gate("garl", OPTIMIZERS), *gate("paft", {"adamw-1e-8": ""})],
        "cold": list(learning("cold", cold, {"adamw": "--lr 3e-4", "sgd": "--optimizer sgd --lr 0.3"}, "ledger",
                              "--steps 80")),
        "warm": list(learning("warm", warm, {f"lr={lr}": f"--lr {lr}" for lr in ("3e-4", "3e-3")}, "ledger",
                              "--steps 80")),
        "noise": noise,
        "schedule": [run for share in (0, 30) for run in learning(
            "cold", {"garl": (1,)}, {f"to 0, noise={share}%": "--q-end 0 --q-steps 60"}, f"{WORK}/noise{share}",
            "--lr 3e-4 --steps 120")],
    }


def make_data() -> None:
    """The colder sets, and ledger with 100 training rows of which a share has another row's answer; the test split of
    a noisy set holds its noisy rows, so that accuracy on it is the share that was memorised."""
    for name, form in FORMS.items():
        if not (WORK / name / "test.jsonl").exists():
            subprocess.run([sys.executable, ROOT / "data" / "make_ledger.py", "--form", form, "--out", WORK / name], check=True)
    rows = [json.loads(line) for line in (ROOT / "data/ledger/train.jsonl").read_text().splitlines()[:100]]
    for share in NOISE:
        folder, rng = WORK / f"noise{share}", random.Random(0)
        folder.mkdir(parents=True, exist_ok=True)
        noisy = [row | {"answer": rng.choice([r["answer"] for r in rows if r["answer"] not in row["answer"]
                                              and row["answer"] not in r["answer"]])} for row in rows[:share]]
        splits = {"train": noisy + rows[share:], "test": noisy or rows}
        for split, lines in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shutil.copy(ROOT / "data/ledger/validation.jsonl", folder)


REAL = "--rollout hf --dtype bfloat16 --model {model} --prompt-limit 900 --think-budget 48 --answer-budget 24 --batch-size 4 --M 8"


def real(model: str) -> list[tuple[str, str]]:
    """Real language: rows of FinQA as they are, of the others with the supporting paragraphs and one more."""
    return [(f"{name} {start} {method} q={q:g} seed={seed}",
             f"{REAL.format(model=model)} --data {name}:{WORK}/{name} --start {start} --method {method} --q {q:g} --steps 40 "
             f"--lr 1e-5 --eval-every 40 --eval-limit 20 --eval-samples 8 --seed {seed}")
            for seed in (0, 1) for name in ("finqa", "hotpotqa", "musique")
            for start in ("cold", "warm") for method, q in (("garl", 0.75), ("grpo", 0), ("paft", 0.75), ("garl", 0))]


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
            dump = "".join(json.dumps(row) + "\n" for row in rows) if file.endswith("l") else json.dumps(rows)
            (WORK / name / file).write_text(dump)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Running them
# ---------------------------------------------------------------------------------------------------------------------
COLUMNS = ("q", "log_P_mean", "loss", "reward", "ess", "grad_norm", "above_eps", "val_p@1", "val_p@16", "val_maj@16")


def columns(path: Path) -> dict[str, list]:
    """What a metrics.jsonl holds, by columns, with four digits; a column of nothing is left out."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    short = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
    table = {name: [short(row.get(name)) for row in rows] for name in COLUMNS}
    return {name: values for name, values in table.items() if any(x is not None for x in values)}


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
    line = {"run": name, "command": f"OMP_NUM_THREADS=1 python tsallis_rl.py {command}"}
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = tsallis_rl.main([*command.split(), "--out", str(out)])
        if table != "gate" and code == 0:
            config = replace(tsallis_rl.parse(command.split()), model=str(out / "best"), eval_samples=16)
            records = load(config.data, "test", 100)
            line["test"] = summarize(tsallis_rl.answer(config, records), records)
    line |= {"exit": code, "seconds": round(time.perf_counter() - start, 1), "metrics": columns(out / "metrics.jsonl")}
    if table == "gate":
        shutil.rmtree(out)
    return line


def run_tables(names: list[str], jobs: int) -> None:
    """The runs that data/results/ lacks, `jobs` at a time, each on one thread."""
    RESULTS.mkdir(exist_ok=True)
    make_data()
    done = {table: {line["run"] for line in read(table)} for table in names}
    todo = [(table, *run) for table in names for run in tables()[table] if run[0] not in done[table]]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for i, (job, line) in enumerate(zip(todo, pool.imap(run_one, todo)), 1):
            with open(RESULTS / f"{job[0]}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{i}/{len(todo)} {job[0]} {line['run']}: {line['seconds']} s", flush=True)


def read(table: str) -> list[dict]:
    """The runs of a table; none if it was not run."""
    path = RESULTS / f"{table}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# 3. The gate's line, from step 0 alone
# ---------------------------------------------------------------------------------------------------------------------
# GARL's gradient of a weight is P^(1-q) / M^q times that of log P, so M^(1-q) P^(1-q) g1, where g1 is its gradient at
# q = 1. AdamW divides it by itself as long as it is above eps (or above about 1e-21, whose square float32 no longer
# holds), so a start is passed where
#
#     (1 - q) (|log P0| - log M) < log(g1 / eps)
#
# SGD moves log P by lr P^(1-q) / M^q G^2 a step, G = M |g at q = 1|: passed in T steps where
#
#     (1 - q) (|log P0| - log M) < log(lr T G^2 / M)
def predict() -> None:
    """log P0 and |g1| of each form, the mean over seeds, to data/results/gate-line.json: from step 0 at q = 1."""
    import torch
    import tsallis_rl
    make_data()
    line = {}
    for form in FORMS:
        measured = []
        for seed in SEEDS:
            command = dict(gate("garl", {"adamw-1e-8": ""}))[f"garl {form} adamw-1e-8 q=1 seed={seed}"]
            config = tsallis_rl.parse([*command.split(), "--clip", "1e9"])
            run = tsallis_rl.start_run(config, Path(WORK / "predict"), torch.device("cpu"))
            results, _ = tsallis_rl.update(run, tsallis_rl.sample_groups(run, 0), 0)
            g = torch.cat([p.grad.abs().flatten() for p in run.model.parameters()]).double()
            measured.append({"log_P0": fmean(row["log_P_mean"] for *_, row in results), "norm": g.square().sum().sqrt().item(),
                             "median": g[g > 0].median().item(), "zero": (g == 0).double().mean().item()})
        line[form] = {name: fmean(m[name] for m in measured) for name in measured[0]}
        print(form, line[form], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gate-line.json").write_text(json.dumps(line, indent=1) + "\n")


def room(optimizer: str, start: dict, M: int = 16, steps: int = 40) -> float:
    """The right-hand side: how many nats of (1 - q) (|log P0| - log M) an optimiser passes."""
    if optimizer == "sgd":
        return math.log(0.1 * steps * (M * start["norm"])**2 / M)
    return math.log(start["median"] / max(float(optimizer.removeprefix("adamw-")), 1e-21))


def escape(line: dict) -> int | None:
    """The first step at which mean log P has come half of the way from its start to 0; None if it never does."""
    log_P = line["metrics"]["log_P_mean"]
    return next((step for step, x in enumerate(log_P) if x is not None and x > log_P[0] / 2), None)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Tables and figures
# ---------------------------------------------------------------------------------------------------------------------
def spread(values: list[float], form: str = ".0f") -> str:
    """Mean and range over the seeds."""
    return f"{fmean(values):{form}} ({min(values):{form}}-{max(values):{form}})" if values else "-"


def print_gate() -> None:
    """A row per method, optimiser and form: the median escape step at each q, and what the line says of it."""
    start, cells = json.loads((RESULTS / "gate-line.json").read_text()), defaultdict(list)
    for line in read("gate"):
        method, form, optimizer, q, _ = line["run"].split()
        cells[method, optimizer, form, float(q[2:])].append(escape(line))
    print("| method | optimiser | log P0 | passes | " + " | ".join(f"q = {q:g}" for q in QS) + " |\n" + "|---" * 10 + "|")
    right = []
    for method, optimizer, form in dict.fromkeys(key[:3] for key in cells):
        log_P0, limit, row = -start[form]["log_P0"], room(optimizer, start[form]), []
        for q in QS:
            steps = cells[method, optimizer, form, q]
            passed, predicted = sum(s is not None for s in steps) > len(steps) / 2, (1 - q) * (log_P0 - math.log(16)) < limit
            right.append((method, optimizer, passed == predicted))
            middle = sorted(steps, key=lambda s: 99 if s is None else s)[len(steps) // 2]
            row.append(("flat" if middle is None else str(middle)) + (" (!)" if passed != predicted else ""))
        print(f"| {method} | {optimizer} | {-log_P0:.0f} | {limit:.0f} nats | " + " | ".join(row) + " |")
    for key in dict.fromkeys(r[:2] for r in right):
        hits = [r[2] for r in right if r[:2] == key]
        print(f"{' '.join(key)}: {sum(hits)} of {len(hits)} cells on the predicted side")
    print(f"all: {sum(r[2] for r in right)} of {len(right)}")


def print_learning(table: str) -> None:
    """A row per method, variant and q: validation, then the best checkpoint on the test split."""
    groups = defaultdict(list)
    for line in read(table):
        groups[line["run"].rsplit(" seed", 1)[0]].append(line)
    print("| run | log P, last | maj@16, validation, last | p@1 | p@16 | maj@16 on test |\n" + "|---" * 6 + "|")
    for name, lines in groups.items():
        last = lambda key: [x[-1] for line in lines if (x := line["metrics"].get(key)) and x[-1] is not None]
        test = [spread([line["test"][key] for line in lines if "test" in line]) for key in ("p@1", "p@16", "maj@16")]
        print(f"| {name} | {spread(last('log_P_mean'), '.1f')} | {spread(last('val_maj@16'))} | " + " | ".join(test) + " |")


def figures() -> None:
    """data/figures/gate.png and learning.png; the tables to the terminal."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    FIGURES.mkdir(exist_ok=True)
    if read("gate"):
        print_gate()
        start, cells = json.loads((RESULTS / "gate-line.json").read_text()), defaultdict(lambda: defaultdict(list))
        for line in read("gate"):
            method, form, optimizer, q, _ = line["run"].split()
            cells[method, optimizer][float(q[2:]), -start[form]["log_P0"]].append(escape(line))
        figure, axes = pyplot.subplots(1, len(cells), figsize=(3.4 * len(cells), 3.6), layout="constrained", sharey=True)
        for axis, ((method, optimizer), points) in zip(axes, cells.items()):
            for (q, log_P0), steps in points.items():
                for i, step in enumerate(sorted(steps, key=lambda s: 99 if s is None else s)):  # a mark a seed
                    look = dict(marker="x", c="black") if step is None else dict(c=[step], cmap="viridis", vmin=5, vmax=40)
                    shown = axis.scatter(q + 0.03 * (i - 1), log_P0, s=24, **look)
                    drawn = shown if step is not None else drawn
            limit = median(room(optimizer, s) for s in start.values())
            qs = [i / 200 for i in range(200)]
            axis.plot(qs, [math.log(16) + limit / (1 - q) for q in qs], c="crimson", label="predicted from step 0")
            axis.set(xlabel="q", title=f"{method}, {optimizer}", ylim=(0, 1.1 * max(y for _, y in points)))
        axes[0].set(ylabel="|log P| at the start (nats)")
        axes[0].legend(loc="upper left")
        figure.colorbar(drawn, ax=axes, label="step of escape (x: none in 40)")
        figure.savefig(FIGURES / "gate.png", dpi=130)
    panels = {("cold", "adamw"): "cold start, AdamW", ("cold", "sgd"): "cold start, SGD", ("warm", "lr=3e-4"): "warm, lr 3e-4",
              ("warm", "lr=3e-3"): "warm, lr 3e-3"}
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, ((table, variant), title) in zip(axes.flat, panels.items()):
        groups = defaultdict(list)
        for line in read(table):
            method, found, q, _ = line["run"].split()
            if found == variant:
                groups[method if method == "grpo" else f"{method} {q}"].append(line["metrics"]["val_maj@16"])
        for name, runs in groups.items():
            steps = [i for i, x in enumerate(runs[0]) if x is not None]
            at = [[run[i] for run in runs if i < len(run) and run[i] is not None] for i in steps]
            curve, = axis.plot(steps, [fmean(x) for x in at], label=name)
            axis.fill_between(steps, [min(x) for x in at], [max(x) for x in at], alpha=0.15, color=curve.get_color())
        axis.set(title=title, xlabel="step", ylabel="validation maj@16 (%), mean and range of seeds", ylim=(-3, 103))
        axis.legend(fontsize=8)
    figure.savefig(FIGURES / "learning.png", dpi=110)
    for table in ("cold", "warm", "noise", "schedule"):
        if read(table):
            print(f"\n{table}\n")
            print_learning(table)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Main
# ---------------------------------------------------------------------------------------------------------------------
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*tables(), "predict"], metavar="TABLE", help="tables to run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--figures", action="store_true", help="draw the figures and print the tables")
    given = parser.parse_args()
    os.chdir(ROOT)
    if "predict" in given.tables:
        predict()
    if names := [name for name in given.tables if name != "predict"]:
        run_tables(names, given.jobs)
    if given.figures:
        figures()


if __name__ == "__main__":
    main()
