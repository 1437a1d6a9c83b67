"""
Time and memory of a training step: python tests/bench.py --prompt 470 --response 64 --M 16

Each repeat is one real step (`tsallis_rl.train_step`: sampling, gradient, update, weights to
the sampler) of every variant in turn, so that a noisy machine hits all alike. A variant is a
sampler (--rollout), a length of the prompt and a number of rollouts, and each sampler has its
own process. On a GPU, which they cannot share, one sampler follows the other. Rollouts have
full length: no token ends them. Medians stand at the end.

share: floating-point operations (6 x parameters x distinct tokens; the prompt counts once) in
a second of the training phase, as a share of a plain matrix product's in the same process.

    python tests/bench.py --model FOLDER --rollout hf vllm        # two samplers
    python tests/bench.py --prompt 512 1024 --M 16 32             # longer prompts, more rollouts
    python tests/bench.py --model qwen3-0.6b --prompt 1024 --response 512 --M 32   # on a GPU
    python tests/bench.py --log-probs                             # memory with 151,936 tokens
"""
import argparse
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tsallis_rl as t
from data import LAB_MODEL, Record

SPAWN = multiprocessing.get_context("spawn")
QWEN3 = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
             num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             tie_word_embeddings=True, max_position_embeddings=40960)
PHASES = ("rollout", "train")


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a square matrix product, median of 9."""
    n = 8192 if device.type == "cuda" else 2048
    a, seconds = torch.randn(n, n, dtype=dtype, device=device), []
    for _ in range(11):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])


def peak_memory() -> float:
    """GiB: of torch's tensors on a GPU, of the process on a CPU."""
    gpu = torch.cuda.max_memory_allocated()
    return (gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def model_folder(name: str, folder: str) -> str:
    """`name`, or for qwen3-0.6b a model of that shape with random weights in `folder`."""
    if name != "qwen3-0.6b":
        return name
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    Qwen3ForCausalLM(Qwen3Config(**QWEN3)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LAB_MODEL).save_pretrained(folder)
    return folder


def endless(template: t.Template, vocabulary: int) -> t.Template:
    """A template whose samples practically never end."""
    template.end = vocabulary - 1
    template.ends = {template.end}
    template.stop = template.ends
    return template


def serve(connection, args, rollout: str, path: str) -> None:
    """Answer each (prompt length, M) with the figures of one step. None ends the process."""
    device = t.start_processes()
    model, template = t.load_model(path, device)
    vocabulary, parameters = model.config.vocab_size, model.num_parameters()
    template = endless(template, vocabulary)
    config = t.resolve(t.Config(
        model=path, method=args.method, dtype=args.dtype, rollout=rollout, batch_size=1, lr=1e-6,
        think_budget=args.response, token_budget=args.token_budget, gpu_share=args.gpu_share))
    words = torch.randint(10, vocabulary // 2, (max(args.prompt),)).tolist()
    examples = {n: [(Record("0", "", "", "42"), words[:n])] for n in args.prompt}
    engine = t.make_engine(config, path, model, template, sum(examples.values(), []))
    run = t.Run(config, Path("."), model, engine, t.make_optimizer(model, config), [], [])
    engine.sync(model)
    rate = matrix_rate(getattr(torch, config.dtype), device)
    while shape := connection.recv():
        length, M = shape
        run.config = replace(config, M=M, K=M, eval_every=2**40)  # no samples.jsonl
        run.train = examples[length]
        row = t.train_step(run, run.step + 1)
        tokens = length + M * len(template.forced([]) + template.gold("42")) + M * args.response
        operations = 6 * parameters * tokens
        connection.send({
            **{phase: row[f"seconds_{phase}"] for phase in PHASES}, "peak GiB": peak_memory(),
            "share": operations / row["seconds_train"] / rate})


def start(target, *arguments) -> tuple:
    """(connection, process) of a function in a process of its own."""
    connection, other = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(other, *arguments), daemon=True)
    process.start()
    other.close()
    return connection, process


def steps(args) -> None:
    """Run all variants, print every repeat, then the medians."""
    shapes, rows = list(itertools.product(args.prompt, args.M)), {}
    together = [[x] for x in args.rollout] if torch.cuda.is_available() else [args.rollout]
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(args.model, folder)
        for names in together:
            running = {name: start(serve, args, name, path) for name in names}
            for repeat in range(args.repeats + 1):  # the first warms up
                for shape, (name, (connection, _)) in itertools.product(shapes, running.items()):
                    try:
                        connection.send(shape)
                        row = connection.recv()
                    except (EOFError, OSError):
                        sys.exit(f"error: the process of {name} ended; its reason stands above")
                    if repeat:
                        rows.setdefault((*shape, name), []).append(row)
                    shown = {key: round(value, 3) for key, value in row.items()}
                    print(repeat or "warm-up", shape, name, json.dumps(shown), flush=True)
            for connection, process in running.values():
                connection.send(None)
                process.join()
    for (length, M, name), some in rows.items():
        row = {key: statistics.median(row[key] for row in some) for key in some[0]}
        print(f"prompt {length}, response {args.response}, M {M}, {name}: medians of {len(some)}: "
              f"rollout {row['rollout']:.2f} s, train {row['train']:.2f} s, peak "
              f"{row['peak GiB']:.1f} GiB, {row['share']:.1%} of the matrix rate")


def log_probs_once(connection, M: int, naive: bool) -> None:
    """Memory of log-probabilities, forward and backward: M responses of 1,024 tokens."""
    torch.manual_seed(0)
    N, D, V = M * 1024, 64, QWEN3["vocab_size"]
    hidden, target = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    weight = torch.nn.Parameter(torch.randn(V, D) / D**0.5)
    before, start = peak_memory(), time.perf_counter()
    if naive:
        log_p = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    else:
        log_p = t.token_log_probs(hidden, weight, target)
    log_p.mean().backward()
    connection.send((peak_memory() - before, time.perf_counter() - start))


def main() -> None:
    """Say what the machine is, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=LAB_MODEL, help="folder, or qwen3-0.6b (random)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[470], help="tokens")
    parser.add_argument("--response", type=int, default=64, help="sampled tokens of a rollout")
    parser.add_argument("--M", type=int, nargs="+", default=[16], help="rollouts")
    parser.add_argument("--method", default="garl", choices=("garl", "paft"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rollout", nargs="+", default=["hf"], choices=("hf", "vllm"))
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--gpu-share", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--log-probs", action="store_true", help="memory of a large vocabulary")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {device}, torch {torch.__version__}")
    if not args.log_probs:
        return steps(args)
    for M, naive in ((2, True), (2, False), (32, False)):  # naive at 32 does not fit
        gigabytes, seconds = start(log_probs_once, M, naive)[0].recv()
        print(f"M {M}, {'naive' if naive else 'in chunks'}: {gigabytes:.2f} GiB, {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(t.exit_code(main))
