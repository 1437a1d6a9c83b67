"""
Evaluate a checkpoint: sample 16 answers to each question, report p@1, p@16 and maj@16.

    python eval.py --model runs/NAME/best                      # settings of that run
    python eval.py --model Qwen/Qwen3-0.6B --data finqa        # any Hugging Face model
    python eval.py --plot runs/* --out curves.png              # learning curves

The verifiers and the majority vote are in data/verifiers.py.
"""
import argparse
import os
import sys
from collections import Counter
from dataclasses import fields, make_dataclass
from pathlib import Path
from statistics import fmean

import tsallis_rl
from data import SPLITS, Record, dataset_name, load
from data.files import UserError, exit_code, named, read_json, read_log, to_jsonl, write_text
from data.verifiers import aliases_of, bootstrap_interval, majority_vote, verdicts
from tsallis_rl import Config, absolute, rank, say
from transformers import HfArgumentParser

# what the evaluation of a checkpoint takes over from its run, unless it is given
FROM_RUN = ("data", "start", "prompt_limit", "think_budget", "answer_budget", "rollout",
            "token_budget", "eval_samples", "dtype", "seed")
RULES = {  # when an answer is right
    "correct": "the gold answer is in it, or an alias as whole words",
    "paper": "the gold answer is in it",
    "exact": "it is the gold answer (the training reward)",
    "numeric": "it is the same number as the gold answer",
    "em": "the official evaluator says so",
    "f1": "(overlap of words, by the official evaluator)",
}


# --- Settings -------------------------------------------------------------------------
def make_parser() -> HfArgumentParser:
    """Some of the trainer's settings, and those of the evaluation."""
    names = (*FROM_RUN, "model", "limit", "gpu_share")
    some = [(f.name, f.type, f) for f in fields(Config) if f.name in names]
    parser = HfArgumentParser(make_dataclass("Settings", some), usage=argparse.SUPPRESS,
                              allow_abbrev=False)
    parser.add_argument("--split", choices=SPLITS, default="test", help="part of the data")
    parser.add_argument("--out", help="JSONL of all answers, or the figure")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="draw these runs instead")
    return parser


def run_of(model: str) -> dict:
    """The settings of the run that a checkpoint belongs to; {} if there is none."""
    for folder in (Path(absolute(model)), Path(os.path.realpath(absolute(model)))):
        if folder.is_dir() and (folder.parent / "config.json").is_file():
            return read_json(folder.parent / "config.json").get("settings", {})
    return {}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The settings of the checkpoint's run are the defaults."""
    parser = make_parser()
    given = parser.parse_args(argv)
    if bool(given.model) == bool(given.plot):
        raise UserError("pass either --model or --plot")
    run = run_of(given.model) if given.model else {}
    if run:
        parser.set_defaults(**{name: run[name] for name in FROM_RUN if name in run})
        if given.split == "validation":  # on as many prompts as the run
            limits = [run[name] for name in ("limit", "eval_limit") if run.get(name)]
            parser.set_defaults(limit=min(limits, default=None))
        given = parser.parse_args(argv)
    return given


# --- Evaluation -----------------------------------------------------------------------
def answers_to(config: Config, records: list[Record]) -> list[list[str] | None]:
    """Sampled answers to each record; None where the prompt was too long."""
    model, template = tsallis_rl.load_model(config.model, tsallis_rl.start_processes())
    examples = tsallis_rl.encode(records, config, template, model, training=False)
    engine = tsallis_rl.make_engine(config, config.model, model, template, examples)
    engine.sync(model)
    return tsallis_rl.sample_answers(engine, examples, config)


def grade(dataset: str, record: Record, samples: list[str] | None) -> dict:
    """All verdicts on the answers to one record and on their majority vote."""
    aliases, vote = aliases_of(record), majority_vote(samples or ())
    judged = [verdicts(dataset, answer, record.answer, aliases) for answer in samples or [""]]
    return {"id": record.id, "gold": record.answer, "aliases": aliases, "answers": samples,
            "vote": vote, "verdicts": judged,
            "vote_verdicts": verdicts(dataset, vote, record.answer, aliases)}


def tabulate(graded: list[dict], n: int) -> dict[str, dict[str, list[float]]]:
    """{rule: {"p@1", "p@n", "maj@n": a value for each record}}."""
    table = {}
    for rule in graded[0]["vote_verdicts"]:
        samples = [[verdict[rule] for verdict in line["verdicts"]] for line in graded]
        table[rule] = {"p@1": [fmean(values) for values in samples],
                       f"p@{n}": [max(values) for values in samples],
                       f"maj@{n}": [line["vote_verdicts"][rule] for line in graded]}
    return table


def evaluate(given: argparse.Namespace) -> None:
    """Sample, grade, print the table, write the answers."""
    settings = {f.name: getattr(given, f.name) for f in fields(Config)
                if hasattr(given, f.name) and f.name != "out"}
    config = tsallis_rl.resolve(Config(**settings))
    name = "-".join([*Path(config.model).parts[-2:], dataset_name(config.data), given.split,
                     config.start])
    out = Path(absolute(given.out or f"eval-{name}.jsonl"))
    if out.exists() or not os.access(out.parent, os.W_OK):  # said before the sampling
        raise UserError(f"{out} exists, or cannot be written: give another --out")
    records = load(config.data, given.split, config.limit)
    answers = answers_to(config, records)
    graded = [grade(dataset_name(config.data), *pair) for pair in zip(records, answers)]

    say(f"{config.model} on {config.data}, {given.split}: {len(records)} prompts, "
        f"{answers.count(None)} too long, {config.eval_samples} samples, {config.start} start, "
        f"seed {config.seed}\npercent [95% bootstrap interval]; p@1: mean over samples, "
        f"p@{config.eval_samples}: any of them, maj@{config.eval_samples}: majority vote\n")
    for rule, columns in tabulate(graded, config.eval_samples).items():
        cells = ["**headline**" if rule == "correct" else rule]
        for values in columns.values():
            low, high = (100 * x for x in bootstrap_interval(values))
            cells.append(f"{100 * fmean(values):.1f} [{low:.1f}, {high:.1f}]")
        cells.append(RULES.get(rule, ""))
        if rule == "correct":  # the first
            say("| rule | " + " | ".join(columns) + " | an answer is right if |\n"
                + "|---" * len(cells) + "|")
        say("| " + " | ".join(cells) + " |")
    if rank() == 0:
        write_text(out, to_jsonl(graded))
    say(f"\nanswers in {out}")


# --- Figure ---------------------------------------------------------------------------
PANELS = {
    "val_maj@": "validation maj@n (%)",
    "log_P": "mean log P",
    "above_eps": "share of weights with |gradient| > eps",
    "ess": "effective sample size of the weights",
    "effective_reward": "largest (w_m / wbar^q) / M^q",
    "amplified_advantage": "largest c_m / M^q",
}


def labels_of(runs: list[str]) -> list[str]:
    """The names of run folders; with the parent's name where two are equal."""
    paths = [Path(absolute(run)) for run in runs]
    counts = Counter(path.name for path in paths)
    names = [path.name if counts[path.name] == 1 else "/".join(path.parts[-2:])
             for path in paths]
    return [name.replace("$", r"\$").lstrip("_") for name in names]  # "$": formula, "_": none


def plot(runs: list[str], out: str) -> None:
    """Learning curves, and the quantities of Figure 3: one line for each run."""
    logs = [read_log(Path(absolute(run)) / "metrics.jsonl") for run in runs]
    for run, rows in zip(runs, logs):
        if not rows or "step" not in rows[0]:
            raise UserError(f"--plot {run}: no metrics.jsonl with a step is there")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for rows, label in zip(logs, labels_of(runs)):
        for axis, (panel, title) in zip(axes.flat, PANELS.items()):
            points = [(row["step"], row[key]) for row in rows for key in row
                      if key.startswith(panel) and isinstance(row[key], (int, float))]
            axis.plot(*(zip(*points) if points else ([], [])), label=label)
            axis.set(xlabel="step", ylabel=title)
    axes[0, 0].set(ylim=(0, 100))
    axes[0, 0].legend()
    with named(out):  # its suffix names the format; matplotlib refuses what is none
        figure.savefig(absolute(out), dpi=150)
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> None:
    """Evaluate or plot."""
    given = parse(argv)
    if given.plot:
        plot(given.plot, given.out or "curves.png")
    else:
        evaluate(given)


if __name__ == "__main__":
    code = exit_code(main)
    if code == 0 and tsallis_rl.world() > 1:
        tsallis_rl.dist.destroy_process_group()
    sys.exit(code)
