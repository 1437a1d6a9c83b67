"""Small real models and helpers. No test needs the Hub. A GPU is hidden, so that the tests do
the same on every machine; `pytest -m gpu` shows it and runs only the tests for it."""
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: threads only wait

import torch
import tsallis_rl  # before transformers: it hides what breaks transformers
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from data import LAB_MODEL, Record
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)

SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2)
SMALL = ["--rollout", "hf", "--M", "4", "--batch-size", "2", "--limit", "24",
         "--eval-every", "2", "--eval-samples", "4"]  # of the lab model
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run by `pytest -m gpu` alone")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def own_signals():
    """Outside of a run each signal is a KeyboardInterrupt."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)


# --- Programs and what they write -----------------------------------------------------
def program(argv, main=tsallis_rl.main) -> int:
    """Train, or run another `main`, in this process. Returns the exit code."""
    try:
        return tsallis_rl.exit_code(lambda: main(argv))
    except SystemExit as end:  # argparse's
        return end.code


def launch(*argv, processes=2, script=tsallis_rl.__file__) -> subprocess.CompletedProcess:
    """A script under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", script, *argv]
    return subprocess.run(command, timeout=300, capture_output=True, text=True)


def rows(run, name="metrics.jsonl") -> list[dict]:
    """The rows of a log, without wall-clock times."""
    lines = [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines]


def tree(folder) -> dict:
    """Every file and what it holds. The lock holds nothing."""
    return {p: p.is_file() and p.read_bytes() for p in Path(folder).rglob("*") if p.name != "lock"}


@contextmanager
def full_disk(size):
    """No file may grow beyond this number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def weights(run, name="last") -> dict:
    """The parameters in a checkpoint."""
    return load_file(Path(run) / name / "model.safetensors")


def difference(one, two) -> float:
    """The largest difference between the parameters of two runs."""
    a, b = weights(one), weights(two)
    return max((a[k] - b[k]).abs().max().item() for k in a)


def equal(a: dict, b: dict) -> bool:
    """Whether the parameters are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same(one, two) -> bool:
    """Whether two runs are one: logs and checkpoints, bit for bit."""
    logs = ("metrics.jsonl", "samples.jsonl")
    return (all(rows(one, name) == rows(two, name) for name in logs)
            and all(equal(weights(one, name), weights(two, name)) for name in ("last", "best")))


def step_of(run, name="last") -> int:
    """The step of a checkpoint."""
    return torch.load(Path(run) / name / "trainer.pt", weights_only=True)["step"]


# --- Models and templates ---------------------------------------------------------------
def plain_log_probs(model, prompt, ids):
    """log p of each token of a response: one forward pass, all logits, no cache. (T,)."""
    log_p = model(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
    return log_p[len(prompt) - 1:-1].gather(-1, torch.tensor(ids)[:, None])[:, 0]


def plain_template():
    """A byte-level tokenizer that merges over borders and has no </think> token."""
    bpe = ByteLevelBPETokenizer()
    text = ["I think so.\n\n42 is 12% of 350.</think>\n\n12%", "the answer is 3\n\n38",
            "</think> so think .\n\n yes </b> no"] * 50
    bpe.train_from_iterator(text, vocab_size=400, min_frequency=1,
                            special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>",
                                        pad_token="<|im_end|>", chat_template=CHAT)
    return tsallis_rl.Template(tokenizer)


@pytest.fixture(scope="session")
def lab():
    """(model, template) of the lab model."""
    return tsallis_rl.load_model(LAB_MODEL, torch.device("cpu"))


@pytest.fixture(scope="session")
def small(tmp_path_factory, lab):
    """A command line that trains a random model of 100 kB, without --steps and --out."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    shape = SHAPE | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16,
                         num_attention_heads=2, initializer_range=0.5)
    shape["vocab_size"] = len(lab[1].tokenizer)
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)
    lab[1].tokenizer.save_pretrained(folder)
    return ["--rollout", "hf", "--model", folder, "--M", "2", "--batch-size", "2", "--limit", "4",
            "--eval-samples", "2", "--think-budget", "4", "--answer-budget", "2",
            "--eval-every", "1", "--lr", "1e-3"]


@pytest.fixture(params=["qwen3", "llama"])
def random_model(request, lab):
    """A random model with widely different log-probabilities. Some of its rationales end."""
    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=lab[0].config.vocab_size, attn_implementation="lower_right")
    if request.param == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, tie_word_embeddings=True, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    with torch.no_grad():
        model.get_output_embeddings().weight[[lab[1].close[0], lab[1].end]] *= 3
    return model.eval()


@pytest.fixture
def config():
    """Resolved settings with changes: config(q=0.5, method="garl")."""
    return lambda **changes: tsallis_rl.resolve(tsallis_rl.Config(**changes))


def group_of(template, prompt, rollouts, method="garl", gold="27"):
    """A prompt's group as `sample_groups` makes it; for GRPO every third one is right."""
    reward = torch.zeros(len(rollouts)).double()
    if method == "grpo":
        reward[::3] = 1
    else:
        rollouts = [r._replace(y=template.gold(gold)) for r in rollouts]
    return tsallis_rl.Group(Record("0", "", "", gold), prompt, rollouts, reward, seed=5)


def plain_gradient(model, group, config):
    """(log w, gradients) of 1/B of a prompt's surrogate loss, from plain log-probabilities."""
    log_p = [plain_log_probs(model, group.prompt, r.ids) for r in group.rollouts]
    log_pz = torch.stack([x[:len(r.z)].sum() for x, r in zip(log_p, group.rollouts)])
    log_py = torch.stack([x[-len(r.y):].sum() for x, r in zip(log_p, group.rollouts)])
    a, b = tsallis_rl.coefficients(log_py.detach(), group, config)
    loss = -sum(a * log_pz + b * log_py) / config.batch_size
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return log_py.detach(), [torch.zeros(()) if g is None else g for g in grads]


def error(model, grads) -> float:
    """The distance of .grad from these gradients, relative to their length."""
    apart = sum((p.grad - g).square().sum() for p, g in zip(model.parameters(), grads))
    return (apart / sum(g.square().sum() for g in grads)).sqrt().item()
