"""
Time and memory of a training step: python tests/bench.py --prompt 470 --response 64 --M 16

Each repeat is one real step (`tsallis_rl.train_step`: sampling, gradient, update, weights to
the sampler) of every combination of --prompt and --M in turn, so that a noisy machine hits
all alike. Rollouts have full length: no token ends them. Medians stand at the end.

    python tests/bench.py --model FOLDER --rollout vllm           # the other sampler
    python tests/bench.py --prompt 512 1024 --M 16 32             # longer prompts, more rollouts
    python tests/bench.py --model qwen3-0.6b --prompt 1024 --response 512 --M 32   # on a GPU
"""
import argparse
import itertools
import platform
import resource
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tsallis_rl as t
from data import Record
from transformers import Qwen3Config, Qwen3ForCausalLM

QWEN3 = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
             num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             tie_word_embeddings=True, max_position_embeddings=40960)


def peak_memory() -> float:
    """GiB: of torch's tensors on a GPU, of the process on a CPU."""
    gpu = torch.cuda.max_memory_allocated()
    return (gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def random_model(folder: str) -> str:
    """The folder, with a model of Qwen3-0.6B's shape in it: for a machine without the Hub."""
    Qwen3ForCausalLM(Qwen3Config(**QWEN3)).save_pretrained(folder)
    t.load_model(t.LAB_MODEL, torch.device("cpu"))[1].tokenizer.save_pretrained(folder)
    return folder


def start_run(args, prompts: dict, folder: str) -> t.Run:
    """A run of one prompt a step, without validation. Its samples practically never end."""
    path = random_model(folder) if args.model == "qwen3-0.6b" else args.model
    model, template = t.load_model(path, t.start_processes())
    template.end = model.config.vocab_size - 1
    template.ends = {template.end}
    template.stop = lambda: template.ends
    config = t.resolve(t.Config(
        model=path, method=args.method, dtype=args.dtype, rollout=args.rollout, lr=1e-6,
        batch_size=1, think_budget=args.response, token_budget=args.token_budget,
        gpu_share=args.gpu_share))
    engine = t.make_engine(config, path, model, template, sum(prompts.values(), []))
    engine.sync(model)
    return t.Run(config, Path("."), model, engine, t.make_optimizer(model, config), [], [])


def measure(run: t.Run, examples: list, M: int) -> dict:
    """The figures of one step."""
    run.config = replace(run.config, M=M, K=M, eval_every=2**40)  # no samples.jsonl
    run.train = examples
    row = t.train_step(run, run.step + 1)
    return {"rollout": row["seconds_rollout"], "train": row["seconds_train"],
            "peak": peak_memory()}


def main() -> None:
    """Say what the machine is, measure, print every repeat, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=t.LAB_MODEL, help="folder, or qwen3-0.6b (random)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[470], help="tokens")
    parser.add_argument("--response", type=int, default=64, help="sampled tokens of a rollout")
    parser.add_argument("--M", type=int, nargs="+", default=[16], help="rollouts")
    parser.add_argument("--method", default="garl", choices=("garl", "paft"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rollout", default="hf", choices=("hf", "vllm"))
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--gpu-share", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=5)
    args, gpu = parser.parse_args(), torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {name}, torch {torch.__version__}")

    words = torch.randint(10, 200, (max(args.prompt),)).tolist()
    prompts = {n: [(Record("0", "", "", "42"), words[:n])] for n in args.prompt}
    shapes = list(itertools.product(args.prompt, args.M))
    rows = {shape: [] for shape in shapes}
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(args, prompts, folder)
    for repeat, (n, M) in itertools.product(range(args.repeats + 1), shapes):
        row = measure(run, prompts[n], M)
        print(repeat or "warm-up", n, M, {k: round(x, 3) for k, x in row.items()}, flush=True)
        if repeat:
            rows[n, M].append(row)
    for (n, M), some in rows.items():
        row = {key: statistics.median(row[key] for row in some) for key in some[0]}
        print(f"prompt {n}, response {args.response}, M {M}, {args.rollout}: medians of "
              f"{len(some)}: rollout {row['rollout']:.2f} s, train {row['train']:.2f} s, "
              f"peak {row['peak']:.1f} GiB")


if __name__ == "__main__":
    sys.exit(t.exit_code(main))
