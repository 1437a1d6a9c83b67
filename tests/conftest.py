"""Small real models: the shipped lab model, and random ones of other shapes."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tsallis_rl import LAB_MODEL, Config, load_model, resolve  # before transformers: see its guard

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, initializer_range=0.2)


@pytest.fixture(scope="session")
def lab():
    """(model, format) of the lab model."""
    return load_model(LAB_MODEL)


@pytest.fixture(params=["qwen3", "llama"])
def random_model(request, lab):
    """A random model over the lab model's vocabulary; wide initialisation, so that log-probabilities differ, and larger
    weights for the tokens that end a rationale, so that some do."""
    torch.manual_seed(0)
    vocabulary, fmt = lab[0].config.vocab_size, lab[1]
    if request.param == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, head_dim=32, tie_word_embeddings=True, **SHAPE))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **SHAPE))
    with torch.no_grad():
        model.get_output_embeddings().weight[[fmt.close[0], fmt.end]] *= 3
    model.set_attn_implementation("grouped_sdpa")  # as load_model does
    return model.eval()


@pytest.fixture
def config():
    """Resolved settings with overrides: config(q=0.5, method="garl")."""
    return lambda **changes: resolve(Config(**changes))
