"""
Time and memory of a training step: python tests/bench.py --prompt 470 --M 16

Each repeat is one real step (`tsallis_rl.train_step`: sampling, gradient, update, weights to
the sampler). Rollouts have full length: no token ends them. Medians stand at the end. All
options but --prompt and --repeats are those of tsallis_rl.py:

    python tests/bench.py --model FOLDER --rollout vllm           # the other sampler
    python tests/bench.py --model qwen3-0.6b --prompt 1024 --think-budget 512   # on a GPU
"""
import argparse
import resource
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tsallis_rl as t
from data import LAB_MODEL, Record
from transformers import Qwen3Config, Qwen3ForCausalLM

QWEN3 = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
             num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             tie_word_embeddings=True, max_position_embeddings=40960)
DEFAULTS = ["--method", "garl", "--M", "16", "--batch-size", "1", "--think-budget", "64",
            "--answer-budget", "8", "--lr", "1e-6"]
FIGURES = "rollout {:.2f} s, train {:.2f} s, peak {:.1f} GiB"


def peak_memory() -> float:
    """GiB: of torch's tensors on a GPU, of the process on a CPU."""
    gpu = torch.cuda.max_memory_allocated()
    return (gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def random_model(folder: str) -> str:
    """The folder, with a model of Qwen3-0.6B's shape in it: for a machine without the Hub."""
    Qwen3ForCausalLM(Qwen3Config(**QWEN3)).save_pretrained(folder)
    t.load_model(LAB_MODEL, torch.device("cpu"))[1].tokenizer.save_pretrained(folder)
    return folder


def start_run(config: t.Config, length: int, folder: str) -> t.Run:
    """A run with one prompt of this length. Its samples practically never end."""
    path = random_model(folder) if config.model == "qwen3-0.6b" else config.model
    model, template = t.load_model(path, t.start_processes())
    template.end = model.config.vocab_size - 1
    template.ends = {template.end}
    template.stop = template.ends
    examples = [(Record("0", "", "", "42"), torch.randint(10, 200, (length,)).tolist())]
    engine = t.make_engine(config, path, model, template, examples)
    config = replace(config, eval_every=2**40)  # no samples.jsonl
    return t.Run(config, Path("."), model, engine, t.make_optimizer(model, config), examples, [])


def main() -> None:
    """Say what the machine is, measure, print every repeat, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", type=int, default=470, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    given, rest = parser.parse_known_args()
    config, gpu = t.parse([*DEFAULTS, *rest]), torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(config, given.prompt, folder)
    steps = []
    for step in range(1, given.repeats + 2):  # the first warms up
        row = t.train_step(run, step)
        steps.append((row["seconds_rollout"], row["seconds_train"], peak_memory()))
        print(f"step {step}", FIGURES.format(*steps[-1]), flush=True)
    print("medians", FIGURES.format(*map(statistics.median, zip(*steps[1:]))))


if __name__ == "__main__":
    sys.exit(t.exit_code(main))
