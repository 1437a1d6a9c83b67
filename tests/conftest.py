"""Small real models: the shipped lab model, and random ones of other shapes. No test needs a GPU or the Hub.

A GPU is hidden, so that the suite does the same on every machine; `pytest -m gpu` shows it and runs the tests for it alone.
"""
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, initializer_range=0.2)


def pytest_configure(config):
    """Before any test module imports torch."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run by `pytest -m gpu` alone")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would wait for one another
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """A gpu test is skipped unless it is asked for."""
    for item in items:
        if "gpu" in item.keywords and config.option.markexpr != "gpu":
            item.add_marker(pytest.mark.skip(reason="for a GPU: pytest -m gpu"))


@pytest.fixture(autouse=True)
def own_signals():
    """`main` in this process sets handlers for its run; outside of one each signal is a KeyboardInterrupt."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for name in names:
        signal.signal(name, signal.default_int_handler)
    yield
    for name in names:
        signal.signal(name, signal.default_int_handler)


@pytest.fixture(scope="session")
def lab():
    """(model, format) of the lab model."""
    import torch

    from tsallis_rl import LAB_MODEL, load_model
    return load_model(LAB_MODEL, torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, lab):
    """A folder with a model of 100 kB: a random one, over the lab model's tokens."""
    import torch

    from transformers import Qwen3Config, Qwen3ForCausalLM
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = SHAPE | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(lab[1].tokenizer), head_dim=16, **shape)).save_pretrained(folder)
    lab[1].tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(tiny):
    """A command line for it that takes a second, without --steps and --out."""
    return ["--rollout", "hf", "--model", str(tiny), "--M", "2", "--batch-size", "2", "--limit", "4", "--eval-samples", "2",
            "--think-budget", "4", "--answer-budget", "2", "--eval-every", "1", "--lr", "1e-3"]


@pytest.fixture(params=["qwen3", "llama"])
def random_model(request, lab):
    """A random model over the lab model's vocabulary; wide initialisation, so that log-probabilities differ, and larger
    weights for the tokens that end a rationale, so that some do."""
    import torch

    from data.models import ATTENTION  # before transformers: see its guard
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    vocabulary, fmt = lab[0].config.vocab_size, lab[1]
    if request.param == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, head_dim=32, tie_word_embeddings=True, **SHAPE))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **SHAPE))
    with torch.no_grad():
        model.get_output_embeddings().weight[[fmt.close[0], fmt.end]] *= 3
    model.set_attn_implementation(ATTENTION)  # as load_model does
    return model.eval()


@pytest.fixture
def config():
    """Resolved settings with overrides: config(q=0.5, method="garl")."""
    from tsallis_rl import Config, resolve
    return lambda **changes: resolve(Config(**changes))
