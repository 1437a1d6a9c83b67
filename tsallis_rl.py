"""Tsallis-loss training of reasoning models: the estimators GARL and PAFT, from q = 0 (RLVR) to q = 1 (log-likelihood).

Reference implementation of "How Fast Should a Model Commit to Supervision? Training Reasoning Models on the Tsallis
Loss Continuum" (Lin & Ie, arXiv 2604.25907; equation numbers are those of v1). For an input x*, a gold answer y* and a
sampled rationale z, the success probability P = p(y* | x*) = sum_z p(z | x*) p(y* | x*, z) is trained by

    l_q = -log_q P = (1 - P^(1-q)) / (1 - q)                          (3)   q = 0: 1 - P,  q = 1: -log P
    grad l_q = P^-q grad l_0 = P^(1-q) grad l_1                       (5)

GARL samples z from the prior p(z | x*) and amplifies by P^-q; PAFT resamples the same rollouts by likelihood and
attenuates by P^(1-q). The estimators are the paper's; optimiser, learning rate, batch size, clipping, prompts and tie
rule, which it does not disclose, and a schedule of q are ours (see `Config`, README.md and eval.py).

    python tsallis_rl.py --q 0.75 --method paft                            # two CPU cores, minutes, nothing to download
    python tsallis_rl.py --q 0.75 --method garl --data finqa --start cold  # one GPU: Qwen3-0.6B, vLLM rollouts
    python eval.py --model runs/NAME/best --split test                     # p@1, p@16, maj@16, with the run's settings

Contents: 1 settings, 2 the q-logarithm and the loss, 3 the estimators, 4 several processes, 5 prompts and token
sequences, 6 rollouts, 7 token log-probabilities, 8 the gradient of one prompt, 9 one step, 10 validation and
checkpoints, 11 the training loop, 12 main. Whoever wants the paper's mathematics alone reads 2 and 3.

Letters: B prompts in a step, M rollouts of a prompt, K resampled rollouts, R rows (rollouts run at once), T tokens of a
row, V vocabulary, D hidden size, N scored positions; z rationale, y answer, w = p(y* | x*, z), wbar the mean of w over
the M rollouts, which estimates P; (a, b) the coefficients on log p(z | x) and log p(y | x, z).
"""
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while what follows loads: no traceback; `main` restores it
os.environ.setdefault("GOMP_SPINCOUNT", "500")  # idle threads that spin for long slow a shared CPU down severalfold
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # lengths differ at every step

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Record, dataset_name, load
from data.files import (Parser, UserError, add_settings, append_jsonl, check_settings, commit, cut_log, exit_code,
                        held_folder, read_object, resumed, say as print_line, setting, user_path, versions,
                        write_atomic, write_folder)
from data.models import PromptLayer, cpu_warnings, load_pretrained, positions, sample as continue_rows, vllm_runs_here
from eval import exact_match, summarize
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent
CLOSE, SEAM = "</think>", "\n\n"  # end of the rationale; what stands between it and the answer


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every setting of a run, and so the command line. `resolve` fills in None where it or `PRESETS` has a value.
    Whole numbers are at least `least` (1 if not said), fractions above 0 (or 0 where `least` is)."""
    # the method
    q: float = setting(0.75, "Commitment q in [0, 1]: 0 is RLVR, 1 the log-marginal likelihood (eq. 3).", least=0)
    q_end: float | None = setting(None, "Where q moves to, linearly in --q-steps; --q if not given.", least=0)
    q_steps: int = setting(40, "Steps that q takes from --q to --q-end.")
    method: str = setting("paft", "Estimator: garl (12), garl-score (without its pathwise term), paft (14) or the "
                                  "baseline grpo.", "garl", "garl-score", "paft", "grpo")
    M: int = setting(32, "Rollouts per prompt.", least=2)
    K: int | None = setting(None, "PAFT: rationales resampled from the M; M if not given, as in the paper.")
    # model and data
    data: str = setting("ledger", "ledger, finqa, hotpotqa, musique (the Hub's), NAME:PATH (official files) or PATH.")
    start: str = setting("warm", "Prompt: warm has task and answer form, cold the problem alone.", "warm", "cold")
    model: str | None = setting(None, "Hugging Face model, a folder or a Hub id.")
    limit: int | None = setting(None, "Use at most this many records of each split.")
    prompt_limit: int = setting(4096, "Prompts of more tokens are dropped, and counted.", least=2)
    # sampling
    think_budget: int | None = setting(None, "Tokens of a rationale; when they are spent </think> is forced.")
    answer_budget: int | None = setting(None, "Tokens of a sampled answer (GRPO and evaluation).")
    rollout: str = setting("auto", "Sampler: vllm, hf (transformers), auto: vLLM where it runs.", "auto", "vllm", "hf")
    gpu_share: float = setting(0.4, "Share of the GPU's memory that vLLM takes.")
    gap_bound: float | None = setting(None, "Stop where the log p of sampler and trainer differ by more nats a "
                                            "token; 1e-3 in float32 and 0.2 in bfloat16 if not given.")
    # optimisation
    steps: int | None = setting(None, "Optimiser steps; 0 measures the start alone.", least=0)
    batch_size: int = setting(8, "Prompts per step (B).")
    lr: float | None = setting(None, "Learning rate after the warm-up.")
    warmup: int = setting(5, "Steps of linear warm-up.", least=0)
    optimizer: str = setting("adamw", "adamw, or sgd, under which P^-q / M^q shows, up to --clip.", "adamw", "sgd")
    eps: float = setting(1e-8, "AdamW's epsilon: a weight whose gradient is below it hardly moves.")
    clip: float = setting(1.0, "Largest norm of the gradient.")
    dtype: str = setting("auto", "float32, bfloat16 (autocast over float32 weights), auto: bfloat16 on CUDA.",
                         "auto", "float32", "bfloat16")
    token_budget: int = setting(8192, "Tokens (prompt and padded responses) held at once in training; rollouts by "
                                      "transformers hold 4 times as many. Lower it when memory runs out.")
    # the run
    seed: int = setting(0, "Seed of the data order and of every sample.", least=0)
    out: str | None = setting(None, "Folder of the run; runs/NAME if not given.")
    resume: str | None = setting(None, "Continue this run exactly; --steps may be raised.")
    eval_every: int | None = setting(None, "Steps between validations, which are also checkpoints.")
    eval_samples: int = setting(16, "Samples per prompt in validation and evaluation.")
    eval_limit: int | None = setting(None, "Validate on at most so many prompts, the first of the split.")


LAB_MODEL = str(ROOT / "data" / "ledger" / "model")
HUB = dict(model="Qwen/Qwen3-0.6B", answer_budget=128, steps=200, lr=2e-6, eval_every=40, eval_limit=128)
PRESETS = {  # the model and the rationale budgets are the paper's (its Section 7; 128 tokens of them for the answer)
    "ledger": dict(model=LAB_MODEL, think_budget=24, answer_budget=8, steps=80, lr=3e-4, eval_every=20),
    "finqa": dict(HUB, think_budget=4096 - 128),
    "hotpotqa": dict(HUB, think_budget=3072 - 128),
    "musique": dict(HUB, think_budget=2048 - 128),
    "custom": dict(HUB, think_budget=2048 - 128),
}
RESUMABLE = {"resume", "steps", "rollout", "token_budget", "gpu_share", "gap_bound"}  # may change on --resume


def resolve(config: Config) -> Config:
    """`config` with every None that has a preset filled in; UserError for a value that no run could use."""
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and torch.cuda.is_available())
    preset = PRESETS[dataset_name(config.data)] | {"K": config.M, "q_end": config.q, "gap_bound": 0.2 if bf16 else 1e-3}
    filled = {name: value for name, value in preset.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **filled, dtype="bfloat16" if bf16 else "float32")
    check_settings(config)
    for name, value in (("--q", config.q), ("--q-end", config.q_end)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} must lie in [0, 1], not {value}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# 2. The q-logarithm and the loss: pure functions on tensors
# ---------------------------------------------------------------------------------------------------------------------
def _check_q(q: float) -> None:
    if not 0 <= q <= 1:
        raise ValueError(f"q must lie in [0, 1], not {q}")


def log_q(u: Tensor | float, q: float) -> Tensor:
    """Tsallis q-logarithm (1): log_q(u) = (u^(1-q) - 1) / (1 - q) for 0 < u <= 1, log u at q = 1. Elementwise."""
    return -tsallis_loss(torch.as_tensor(u).log(), q)


def tsallis_loss(log_P: Tensor | float, q: float) -> Tensor:
    """Loss (3) from log P, elementwise: l_q = -log_q P = (1 - P^(1-q)) / (1 - q); l_0 = 1 - P, l_1 = -log P.
    It takes log P as P underflows; at q < 1 the loss is at most 1 / (1 - q)."""
    _check_q(q)
    log_P = torch.as_tensor(log_P)
    if q == 1:
        return -log_P
    return -torch.expm1((1 - q) * log_P) / (1 - q)  # expm1: nothing cancels as q -> 1


# ---------------------------------------------------------------------------------------------------------------------
# 3. The estimators
# ---------------------------------------------------------------------------------------------------------------------
# M rationales z_m ~ p(z | x*) are drawn, w_m = p(y* | x*, z_m), wbar = mean of w, wbar_{-m} = mean of the other M - 1.
#
#   GARL (7, 12)   ghat = -1/M^q 1/M sum_m [ c_m grad log p(z_m | x*) + w_m / wbar^q grad log p(y* | x*, z_m) ]
#                  c_m = w_m / wbar^q - (wbar_{-m})^(1-q)             first the score-function, then the pathwise term
#   PAFT (14)      ghat = -wbar^(1-q)/M^q 1/K sum_k grad log p(z_{r_k}, y* | x*),  r_k = m with chance w_m / sum w (13)
#
# M^q, the most that w_m / wbar^q can be, is the normaliser of Algorithms 1 and 2, in effect a smaller learning rate at
# larger q under SGD; (12) and (14) do not have it. Every method is a pair of coefficients in one surrogate loss, where
#
#   method               a_m                            b_m                       y
#   GARL                 c_m / (M M^q)                  w_m / (wbar^q M M^q)      gold y*
#   GARL, no baseline    w_m / (wbar^q M M^q)           the same                  gold y*
#   GARL, score only     c_m / (M M^q)                  0                         gold y*; the pathwise term left out
#   PAFT                 wbar^(1-q) n_m / (K M^q)       the same                  gold y*; m was drawn n_m times
#   GRPO                 (r_m - mean r) / std r / M     the same                  the sampled y; r_m = [y = y*]
#
# In log space and float64: for q > 0, w = exp(log_w) underflows long before w_m / wbar^q, which is about P^(1-q).
Coefficients = tuple[Tensor, Tensor]


def surrogate_loss(log_pz: Tensor, log_py: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """-sum_m [a_m log p(z_m | x) + b_m log p(y | x, z_m)], all (..., M). With a, b detached its gradient is ghat."""
    return -(a * log_pz + b * log_py).sum()


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

    q = 0 is Rao-Blackwellised REINFORCE with a leave-one-out baseline (unbiased), q = 1 the IWAE gradient; for q > 0
    the bias is O(1/M) (Thm 6.1). `baseline=False` is the plug-in estimator, a = b, of the same expectation (Prop. 6.2).
    Where all of GRPO's rewards are 0 every w is small, not 0, and so is the gradient, until P^(1-q) underflows.
    log_w: log p(y* | x*, z_m) in nats, (..., M). Returns detached (a, b) of its shape and dtype; M a_m = c_m / M^q and
    M b_m, the effective reward in [0, 1], are Figure 3's. ValueError: q outside [0, 1]; M < 2 with the baseline.
    """
    _check_q(q)
    M, dtype = log_w.shape[-1], log_w.dtype
    if baseline and M < 2:
        raise ValueError("the leave-one-out baseline needs M >= 2 rollouts of a prompt")
    log_w = log_w.detach().double()
    amplified = (log_w - q * _log_mean(log_w)).exp()  # w_m / wbar^q, at most M^q
    c = amplified - ((1 - q) * _log_mean_others(log_w)).exp() if baseline else amplified
    return (c / (M * M**q)).to(dtype), (amplified / (M * M**q)).to(dtype)


def resample(log_w: Tensor, K: int, generator: torch.Generator | None = None) -> Tensor:
    """PAFT's draw (13): how often each rationale is among K drawn with replacement with probability w_m / sum w.
    (..., M) -> counts n of the same shape, in float64, which sum to K. ValueError: K < 1."""
    if K < 1:
        raise ValueError(f"PAFT needs K >= 1 resampled rationales, not {K}")
    posterior = log_w.detach().double().softmax(-1)  # a softmax: defined where every w underflows
    drawn = torch.multinomial(posterior.reshape(-1, log_w.shape[-1]), K, replacement=True, generator=generator)
    return F.one_hot(drawn, log_w.shape[-1]).sum(-2).reshape(log_w.shape).double()


def paft_coefficients(log_w: Tensor, q: float, n: Tensor) -> Coefficients:
    """Posterior-Attenuated Fine-Tuning (14), normalised by M^q (Algorithm 2): SFT on K rationales resampled by w.

    q = 1 is the E-step of EM, q = 0 posterior SFT scaled by P. Its mean over `resample` given the pool is GARL's
    plug-in, so both have one expectation at every M (D.3); the resampling adds variance (D.4). Where no rollout
    succeeds the likelier ones are trained, attenuated by P^(1-q). log_w: as in `garl_coefficients`; n: the counts of
    `resample`, summing to K. Returns detached a = b of log_w's shape and dtype. ValueError: q outside [0, 1].
    """
    _check_q(q)
    M, K = log_w.shape[-1], n.sum(-1, keepdim=True)
    a = (((1 - q) * _log_mean(log_w.detach().double())).exp() * n / (K * M**q)).to(log_w.dtype)
    return a, a


def grpo_coefficients(reward: Tensor) -> Coefficients:
    """The baseline GRPO, for the *sampled* answers: reward r_m = exact match in {0, 1}, (..., M).

    Exactly 0 where all rewards of a prompt agree: a model that never succeeds gets no signal. std is the unbiased one,
    as in common GRPO code. No KL term and no division by length; no ratio and no clip, as with one update per batch of
    rollouts the ratio is 1. Returns detached a = b of reward's shape and dtype. ValueError: M < 2.
    """
    r, M = reward.detach().double(), reward.shape[-1]
    if M < 2:
        raise ValueError("GRPO needs M >= 2 rollouts of a prompt")
    std = r.std(-1, keepdim=True)
    a = ((r - r.mean(-1, keepdim=True)) / std.masked_fill(std == 0, 1) / M).to(reward.dtype)
    return a, a


# ---------------------------------------------------------------------------------------------------------------------
# 4. Several processes: torchrun --nproc-per-node=N tsallis_rl.py ...; each has its own sampler and share of prompts
# ---------------------------------------------------------------------------------------------------------------------
def start_processes() -> torch.device:
    """Join the other processes if torchrun started this one; returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for up to a second, for every new shape
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        try:  # one hour: the others wait while rank 0 saves, and torchrun, not this, notices a process that died
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the processes cannot meet: start them with torchrun ({error})") from error
    return device


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 alone writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(items: list) -> list:
    """The items of all processes, in all of them."""
    parts = [items] * world()
    if world() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def say(text: str) -> None:
    """Print a line above the progress bar, at once, and once however many processes there are."""
    if rank() == 0:
        print_line(text, tqdm.write)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Prompts and token sequences, by id and never by text: prompt | z | </think> | "\n\n" | answer | end token
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """The fixed tokens of a sequence: `close` ends the rationale, `seam` precedes the answer, `end` ends the answer.
    Qwen3 has </think> as one token; for a model without it `close` is the same string made of ordinary tokens."""

    tokenizer: PreTrainedTokenizerBase
    close: list[int]
    seam: list[int]
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Format":
        """The format of a tokenizer; UserError when it has no end token or drops the user's text."""
        if tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no end token (eos_token): p(y* | x*, z) needs one")
        close, seam = (tokenizer.encode(text, add_special_tokens=False) for text in (CLOSE, SEAM))
        fmt = cls(tokenizer, close, seam, tokenizer.eos_token_id)
        try:
            dropped = fmt.prompt("one") == fmt.prompt("two")
        except Exception as error:  # Jinja's own kinds
            raise UserError(f"the model's chat template fails ({error})") from error
        if dropped:
            raise UserError("the model's tokenizer or chat template drops the user's text")
        return fmt

    def prompt(self, text: str) -> list[int]:
        """Ids up to where the model begins to think; Qwen3 in thinking mode opens <think> itself."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text)
        settings = dict(add_generation_prompt=True, enable_thinking=True, return_dict=True)
        return self.tokenizer.apply_chat_template([{"role": "user", "content": text}], **settings)["input_ids"]

    def gold(self, answer: str) -> list[int]:
        """y* as the model must produce it, end token included: without it a gold "3" would gain from "38"."""
        return self.tokenizer.encode(answer, add_special_tokens=False) + [self.end]

    def closed(self, z: Sequence[int]) -> bool:
        """Whether the last token of z is </think> or, where that is no token, completes it as text."""
        if len(self.close) == 1:
            return z[-1] == self.close[0]
        return CLOSE in self.tokenizer.decode(z[-len(CLOSE):])  # at the least one character a token

    def forced(self, closed: bool) -> list[int]:
        """What is put, not sampled, between z and the answer: </think> if z did not end in it, and the seam."""
        return self.seam if closed else self.close + self.seam

    def text(self, y: Sequence[int]) -> str:
        """A sampled answer as text, without its end. Other special tokens stay: "4<|endoftext|>2" is not "42"."""
        return self.tokenizer.decode(y[:-1] if y and y[-1] == self.end else y).strip()


class Rollout(NamedTuple):
    """One sample. Forced tokens are in neither z nor y."""
    z: list[int]  # every id sampled as rationale, its own </think> or a premature end token included
    closed: bool  # z ends in </think>
    y: list[int]  # ids sampled as answer, [] when none was asked for
    log_p: list[float]  # the sampler's log p of each of z + y


FORCED, Z, Y = 0, 1, 2  # kinds of the tokens of a response; padding counts as forced


class Response(NamedTuple):
    """What follows the prompt: T ids and the kind of each. Forced tokens are not scored."""
    ids: list[int]
    kinds: list[int]


def respond(rollout: Rollout, y: list[int], fmt: Format) -> Response:
    """z | forced tokens | y, where y is the gold answer (`Format.gold`) or the rollout's own."""
    z, forced = rollout.z, fmt.forced(rollout.closed)
    return Response(z + forced + y, [Z] * len(z) + [FORCED] * len(forced) + [Y] * len(y))


Example = tuple[Record, list[int]]  # a record and the ids of its prompt, [] where that is too long


def encode(records: list[Record], config: Config, fmt: Format, length: int) -> list[Example]:
    """The records with their warm or cold prompts; one that is too long is dropped whole, never cut."""
    ids = [fmt.prompt(r.warm_prompt if config.start == "warm" else r.cold_prompt) for r in records]
    golds, shortest = [len(fmt.gold(r.answer)) for r in records], min(map(len, ids))
    room = length - config.think_budget - len(fmt.forced(False)) - max(config.answer_budget, *golds)
    limit = min(config.prompt_limit, room)
    if shortest > limit:
        raise UserError(f"every prompt is longer than {limit} tokens (the shortest: {shortest}): raise --prompt-limit "
                        f"or lower --think-budget (of the model's {length} positions it leaves {room})")
    if shortest < 2:
        raise UserError("the tokenizer makes less than two tokens of a prompt")
    examples = [(record, prompt if len(prompt) <= limit else []) for record, prompt in zip(records, ids)]
    say(f"{sum(bool(prompt) for _, prompt in examples)} of {len(ids)} prompts have at most {limit} tokens; "
        f"{sum(n > config.answer_budget for n in golds)} have answers over --answer-budget, which no rollout can match")
    return examples


def seed_of(*key: object) -> int:
    """A 48-bit seed from (run seed, step, prompt, ...): no generator state to save, and resuming is exact."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# 6. Rollouts: `generate`, on one of two engines
# ---------------------------------------------------------------------------------------------------------------------
# Both sample at temperature 1 from the whole vocabulary: the distribution that section 7 scores.
Sampled = tuple[list[int], list[float]]  # ids, and the sampler's log-probabilities of them


def autocast(model: PreTrainedModel, config: Config) -> torch.autocast:
    """bfloat16 where it is asked for. Autocast keeps its copies of the weights until the outermost context ends: one made
    without gradients would cut its weight off from the graph, so the first pass in a context is one with gradients."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def generate(engine: "HFRollouts | VLLMRollouts", prompts: list[list[int]], seeds: list[int], n: int,
             think_budget: int, answer_budget: int, scored: bool = True) -> list[list[Rollout]]:
    """n rollouts of each prompt: a rationale, what is forced after it (the paper's Section 7), then its answer.
    Rationale m of prompt i has the seed seeds[i] + m, its answer a hash of that, or it would replay the rationale's
    noise. GARL and PAFT need z alone: answer_budget = 0. Unless `scored`, log_p may be left empty."""
    fmt, rows = engine.fmt, [prompt for prompt in prompts for _ in range(n)]
    seeds = [seed + m for seed in seeds for m in range(n)]
    rationales = engine.sample(rows, [[]] * len(rows), seeds, think_budget, True, scored)
    rollouts = [Rollout(z, fmt.closed(z), [], log_p) for z, log_p in rationales]
    if answer_budget:
        begun = [r.z + fmt.forced(r.closed) for r in rollouts]
        answers = engine.sample(rows, begun, [seed_of(seed, "answer") for seed in seeds], answer_budget, False, scored)
        rollouts = [Rollout(r.z, r.closed, y, r.log_p + log_p) for r, (y, log_p) in zip(rollouts, answers)]
    return [rollouts[i:i + n] for i in range(0, len(rows), n)]


class HFRollouts:
    """Sampling with transformers (`continue_rows`): a sample depends on its seed, not on what shares its batch."""

    def __init__(self, model: PreTrainedModel, fmt: Format, config: Config):
        self.model, self.fmt, self.config = model, fmt, config

    def sync(self, model: PreTrainedModel) -> None:
        """Nothing: the weights are the trainer's own."""

    def sample(self, prompts: list[list[int]], begun: list[list[int]], seeds: list[int], budget: int, thinking: bool,
               scored: bool) -> list[Sampled]:
        """Row j continues prompts[j] + begun[j] by at most `budget` tokens, through the end token or, when thinking,
        </think>; without gradients."""
        longest = max((len(p) + len(b) for p, b in zip(prompts, begun)), default=0) + budget
        size = max(1, 4 * self.config.token_budget // longest)  # a cached token is about a twentieth of a trained one
        parts = [slice(i, i + size) for i in range(0, len(prompts), size)]
        ended = lambda ids: ids[-1] == self.fmt.end or thinking and self.fmt.closed(ids)
        with autocast(self.model, self.config):
            return [row for at in parts for row in continue_rows(self.model, prompts[at], begun[at], seeds[at],
                                                                  budget, ended)]


class VLLMRollouts:
    """Sampling with vLLM in this process, with prefix caching; weights are handed over after every optimiser step."""

    def __init__(self, path: str, fmt: Format, config: Config, max_length: int):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights need not be sent
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        threads, set_num_threads, random_state = torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state()
        import vllm  # here, as it takes seconds and can only run where `vllm_runs_here`

        if torch.cuda.is_available():  # logits in float32, as in `output_logits`: bfloat16 rounds them by 0.06 nat
            device = dict(gpu_memory_utilization=config.gpu_share, hf_overrides={"head_dtype": "float32"})
        else:  # seeded samples and a prefill in pieces do not go together on a CPU ("Generator does not use offset")
            device = dict(kv_cache_memory_bytes=2 << 30, enforce_eager=True, enable_chunked_prefill=False,
                          block_size=32, max_num_batched_tokens=max(8192, max_length))
        if world() > 1:  # under torchrun: one engine a process, each of them a world of size 1 to vLLM
            device["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(model=path, dtype=config.dtype, max_model_len=max_length, seed=0, generation_config="vllm",
                            enable_prefix_caching=True, disable_log_stats=True, use_tqdm_on_load=False, **device)
        # vLLM reseeds torch, and its CPU worker turns set_num_threads into a function that does nothing
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        self.fmt, self.SamplingParams, self.dtype = fmt, vllm.SamplingParams, getattr(torch, config.dtype)

    def sync(self, model: PreTrainedModel) -> None:
        """Hand the trainer's weights over and forget the keys and values of the old ones."""
        weights = ((name, w.to(self.dtype)) for name, w in model.state_dict().items())  # with a tied output layer
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise UserError("vLLM kept keys and values of the old weights (reset_prefix_cache failed)")

    def sample(self, prompts: list[list[int]], begun: list[list[int]], seeds: list[int], budget: int, thinking: bool,
               scored: bool) -> list[Sampled]:
        """As `HFRollouts.sample`, with log-probabilities only when `scored`."""
        as_text = thinking and len(self.fmt.close) > 1  # </think> is no token: vLLM must look at the text
        close = self.fmt.close if thinking and not as_text else []
        stop = dict(stop_token_ids=[self.fmt.end] + close, ignore_eos=True,  # the end token is among ours
                    stop=[CLOSE] if as_text else None, include_stop_str_in_output=True, detokenize=as_text)
        # all that could bend the distribution, spelled out
        plain = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                     repetition_penalty=1.0, logprobs=0 if scored else None, flat_logprobs=scored)
        params = [self.SamplingParams(seed=seed, max_tokens=budget, **plain, **stop) for seed in seeds]
        contexts = [{"prompt_token_ids": prompt + b} for prompt, b in zip(prompts, begun)]
        outputs = [o.outputs[0] for o in self.llm.generate(contexts, params, use_tqdm=False)] if contexts else []
        return [(list(o.token_ids), list(o.logprobs.logprobs) if scored else []) for o in outputs]


# ---------------------------------------------------------------------------------------------------------------------
# 7. Token log-probabilities, the vocabulary in chunks
# ---------------------------------------------------------------------------------------------------------------------
CHUNK = {"cpu": 2**25, "cuda": 2**28}  # logits held at once: 128 MiB and 1 GiB in float32


def output_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(rows, D), (V, D) -> (rows, V), at least float32; on CUDA bfloat16 factors have an unrounded product."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


class _LogProb(torch.autograd.Function):
    """log softmax(h W^T)[target], (N, D), (V, D), (N,) -> (N,), with one chunk of logits alive at a time.

    By hand: with torch.utils.checkpoint training takes a tenth longer, and torch.mm(out_dtype=) has no derivative.
    d logp / d logits = onehot(target) - softmax(logits), from logits computed again; gradients round as in autocast.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """log p, (N,); keeps log Z = logsumexp(h W^T), not the logits."""
        rows, W, log_p, log_Z = max(1, CHUNK[hidden.device.type] // len(weight)), weight.to(hidden.dtype), [], []
        for h, t in zip(hidden.split(rows), target.split(rows)):
            logits = output_logits(h, W)  # (rows, V)
            log_Z.append(logits.logsumexp(-1))
            log_p.append(logits.gather(-1, t[:, None])[:, 0] - log_Z[-1])
        ctx.save_for_backward(hidden, weight, target, torch.cat(log_Z))
        return torch.cat(log_p)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of hidden and weight, a chunk's logits at a time."""
        hidden, weight, target, log_Z = ctx.saved_tensors
        rows, W = max(1, CHUNK[hidden.device.type] // len(weight)), weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, t, log_z, g, d in zip(*(x.split(rows) for x in (hidden, target, log_Z, grad, d_hidden))):
            d_logits = output_logits(h, W).sub_(log_z[:, None]).exp_().mul_(-g[:, None])
            d_logits = d_logits.scatter_add_(-1, t[:, None], g[:, None]).to(h.dtype)
            torch.mm(d_logits, W, out=d)  # into d_hidden, of which d is a view
            d_weight += d_logits.T @ h
        return d_hidden, d_weight, None


def chunked_log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log p(target) under softmax(hidden weight^T): (N, D), (V, D), (N,) -> (N,), at least float32, nats. Holds `CHUNK`
    logits at most. The output layer must be a plain matrix, without bias or logit scaling: `probe` checks it."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))  # it does not reach into our own Function
    return _LogProb.apply(hidden, weight, target)


# ---------------------------------------------------------------------------------------------------------------------
# 8. The gradient of one prompt, which runs once for all of its rollouts
# ---------------------------------------------------------------------------------------------------------------------
class SharedPrompt:
    """Keys and values of one prompt, computed once for all its responses. The gradients that reach them add up in
    `leaves`; `backward` carries the sum through the prompt once: exact, as backward is linear in what comes in."""

    def __init__(self, model: PreTrainedModel, prompt: list[int], config: Config):
        self.model, self.config = model, config
        self.length, self.last = len(prompt) - 1, prompt[-1]  # the last token's output predicts the response's first
        with autocast(model, config):
            ids = torch.tensor([prompt[:-1]], device=model.device)
            cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
        self.outputs = [x for layer in cache.layers for x in (layer.keys, layer.values)]  # (1, heads, length, size)
        # float32, as gradients add up here
        self.leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in self.outputs]

    def copy_tokens(self) -> int:
        """What a row's copy of the keys and values costs, in trained tokens. A trained token holds about the inputs and
        outputs of every matrix, at four bytes a number."""
        numbers = sum(sum(p.shape) for p in self.model.base_model.parameters() if p.dim() == 2)
        numbers -= sum(self.model.get_input_embeddings().weight.shape)
        size = 2 if self.config.dtype == "bfloat16" else 4
        return math.ceil(size * sum(x.numel() for x in self.leaves) / (4 * numbers))

    def log_probs(self, ids: Tensor, scored: Tensor) -> Tensor:
        """log p of each scored token of the responses given what precedes it, nats, and 0 elsewhere: (R, T), (R, T) ->
        (R, T). Padding is on the right, where no causal position looks."""
        R, T = ids.shape
        cache = Cache(layers=[PromptLayer(*pair) for pair in zip(self.leaves[::2], self.leaves[1::2])])
        with autocast(self.model, self.config):
            inputs = F.pad(ids[:, :-1], (1, 0), value=self.last)
            position = torch.arange(self.length, self.length + T, device=ids.device).unsqueeze(0)
            hidden = self.model.base_model(input_ids=inputs, position_ids=position, past_key_values=cache,
                                           use_cache=True).last_hidden_state  # (R, T, D)
            log_p = chunked_log_probs(hidden[scored], self.model.get_output_embeddings().weight, ids[scored])
        return torch.zeros(R, T, dtype=log_p.dtype, device=ids.device).masked_scatter(scored, log_p)

    def backward(self) -> None:
        """Carry what the responses left at the keys and values back through the prompt."""
        if self.leaves[0].grad is not None:
            torch.autograd.backward(self.outputs, [x.grad.to(y.dtype) for x, y in zip(self.leaves, self.outputs)])


class Group(NamedTuple):
    """The M rollouts of a prompt and what is scored: z with the gold y* (GARL, PAFT) or with its own y (GRPO)."""
    record: Record
    prompt: list[int]
    rollouts: list[Rollout]
    responses: list[Response]
    reward: Tensor | None  # GRPO: (M,)
    seed: int  # of the rollouts; PAFT's draw has one derived from it


def score(shared: SharedPrompt, group: Group, rows: list[int]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Run R responses of a group against their prompt; without gradients only the answers are scored.

    Returns rows, log p(z | x) (R,), log p(y | x, z) (R,), which with the gold answer is log w, and the sampler's gap
    |log p sampler - log p trainer| (sampled tokens,); of these the first and the last mean nothing without gradients.
    """
    ids, kinds = (pad_sequence([torch.tensor(group.responses[m][i]) for m in rows], batch_first=True)
                  .to(shared.model.device) for i in (0, 1))  # (R, T)
    log_p = shared.log_probs(ids, kinds != FORCED if torch.is_grad_enabled() else kinds == Y)
    sampled = kinds == Z if group.reward is None else kinds != FORCED  # a gold answer was not sampled
    sampler = torch.tensor([x for m in rows for x in group.rollouts[m].log_p], device=log_p.device)
    gap = (log_p.detach()[sampled] - sampler).abs().cpu()
    return rows, (log_p * (kinds == Z)).sum(-1), (log_p * (kinds == Y)).sum(-1), gap


def micro_batches(group: Group, rows: Iterable[int], token_budget: int, copy_tokens: int) -> list[list[int]]:
    """Rows by falling length, cut so that prompt + rows x (longest + its copy of the prompt) stays in the budget; one
    row always goes."""
    rows, batches = sorted(rows, key=lambda m: -len(group.responses[m].ids)), []
    while rows:
        longest = len(group.responses[rows[0]].ids) + copy_tokens
        size = max(1, (token_budget - len(group.prompt)) // longest)
        batches.append(rows[:size])
        rows = rows[size:]
    return batches


def coefficients(log_w: Tensor, seed: int, config: Config) -> Coefficients:
    """(a, b) of GARL (12) or PAFT (14) from log w: (M,); NaN where that is not finite, so that `update` skips it."""
    if not log_w.isfinite().all():
        return torch.full_like(log_w, math.nan), torch.full_like(log_w, math.nan)
    if config.method != "paft":
        a, b = garl_coefficients(log_w, config.q)
        return a, b if config.method == "garl" else torch.zeros_like(b)
    generator = torch.Generator().manual_seed(seed_of(seed, "resample"))  # independent of the rollouts' noise
    return paft_coefficients(log_w, config.q, resample(log_w, config.K, generator))


def group_gradient(model: PreTrainedModel, group: Group, config: Config) -> tuple[Tensor, Tensor, dict]:
    """Add 1/B of the gradient of one prompt's surrogate loss to the parameters' .grad: Algorithm 1 or 2, or GRPO.

    w_m always comes from the trainer's own weights, never from the sampler. Where GARL's rollouts fit the token budget
    together, one pass scores and is differentiated; otherwise, and for PAFT, which draws some of them, they are scored
    first, and those whose coefficient is not 0 run again. Returns merit (log w, GRPO: the reward), a and the metrics.
    """
    with autocast(model, config):  # one context, so one copy of the weights, made by the prompt's pass with its graph
        shared, scored, keep_graph = SharedPrompt(model, group.prompt, config), [], False
        batches_of = lambda rows: micro_batches(group, rows, config.token_budget, shared.copy_tokens())
        if config.method == "grpo":
            merit = group.reward
            a, b = grpo_coefficients(merit)
        else:
            batches = batches_of(range(config.M))
            keep_graph = config.method != "paft" and len(batches) == 1
            with torch.set_grad_enabled(keep_graph):
                scored = [score(shared, group, rows) for rows in batches]
            merit = torch.empty(config.M)
            for rows, _, log_w, _ in scored:
                merit[rows] = log_w.detach().float().cpu()  # log w_m = log p(y* | x*, z_m)
            a, b = coefficients(merit, group.seed, config)
        trained = [m for m in range(config.M) if a[m] != 0 or b[m] != 0]  # NaN != 0
        gaps = []
        for batch in batches_of(trained):  # with keep_graph there is one
            rows, log_pz, log_py, gap = scored[0] if keep_graph else score(shared, group, batch)
            loss = surrogate_loss(log_pz, log_py, a[rows].to(log_pz), b[rows].to(log_py)) / config.batch_size
            with torch.autocast(model.device.type, enabled=False):
                loss.backward()
            gaps.append(gap)
        with torch.autocast(model.device.type, enabled=False):
            shared.backward()
    return merit, a, prompt_metrics(group, merit, trained, torch.cat([torch.zeros(0), *gaps]), config)


def prompt_metrics(group: Group, merit: Tensor, trained: list[int], gap: Tensor, config: Config) -> dict:
    """One prompt's part of the step's row; README.md has the glossary. Over the prompts `step_metrics` takes the mean,
    or what a name ends in. None: this method, or this step, does not measure it."""
    M, rollouts = config.M, group.rollouts
    row = dict.fromkeys(("loss", "log_P_mean", "log_P_min", "ess", "effective_reward_max", "amplified_advantage_max",
                         "reward", "sampler_gap_mean", "sampler_gap_max"))
    if config.method == "grpo":
        row["reward"] = merit.mean().item()
        row["loss"] = 1 - row["reward"]  # l_0, with the mean reward as the estimate of P
    else:
        log_w = merit.double()
        log_P, (a, b) = _log_mean(log_w).item(), garl_coefficients(log_w, config.q)
        row |= {"loss": tsallis_loss(log_P, config.q).item(), "log_P_mean": log_P, "log_P_min": log_P}
        row["ess"] = log_w.softmax(-1).square().sum().reciprocal().item()  # (sum w)^2 / sum w^2
        row["effective_reward_max"] = M * b.max().item()  # (w_m / wbar^q) / M^q, Figure 3
        row["amplified_advantage_max"] = M * a.max().item()  # c_m / M^q, Figure 3
    if len(gap):
        row |= {"sampler_gap_mean": gap.mean().item(), "sampler_gap_max": gap.max().item()}
    row["rationale_tokens"] = fmean(len(r.z) for r in rollouts)
    row["forced_share"] = fmean(not r.closed for r in rollouts)
    row["trained_share"] = len(trained) / M
    row["sampled_tokens"] = sum(len(r.z + r.y) for r in rollouts)
    row["trained_tokens"] = len(group.prompt) + sum(len(group.responses[m].ids) for m in trained)
    return row


def step_metrics(rows: list[dict]) -> dict:
    """The prompts' metrics as one: the largest of names in _max, the smallest of names in _min, else the mean."""
    row = {}
    for name in rows[0]:
        values = [prompt[name] for prompt in rows if prompt[name] is not None]
        reduce = {"_max": max, "_min": min}.get(name[-4:], fmean)
        row[name] = reduce(values) if values else None
    return row


# ---------------------------------------------------------------------------------------------------------------------
# 9. One step: B prompts, M rollouts each, one update
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run in progress. `step` optimiser steps are done; `best` is the highest validation maj@16 so far (percent)."""

    config: Config
    out: Path
    model: PreTrainedModel
    engine: HFRollouts | VLLMRollouts
    optimizer: torch.optim.Optimizer
    train: list[Example]
    validation: list[Example]
    step: int = 0
    best: float = -1.0
    skipped: int = 0  # steps in a row without an update because something was not finite
    silent: int = 0  # GARL and PAFT: steps in a row whose gradient was exactly 0
    stop: bool = False  # Ctrl-C was pressed, or the system asks the run to end


def make_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    """AdamW or SGD without weight decay; `update` sets the learning rate. Each process keeps all of its state."""
    kind, own = {"adamw": (torch.optim.AdamW, {"eps": config.eps}), "sgd": (torch.optim.SGD, {})}[config.optimizer]
    return kind(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True, **own)


def batch_of(step: int, config: Config, size: int) -> list[tuple[int, int]]:
    """(index, epoch) of the B prompts of a step: an epoch permutes the `size` records by (seed, epoch); step 0 looks
    at the end of epoch -1."""
    order = lambda epoch: random.Random(seed_of(config.seed, "epoch", epoch)).sample(range(size), size)
    places = (divmod(i, size) for i in range((step - 1) * config.batch_size, step * config.batch_size))
    return [(order(epoch)[at], epoch) for epoch, at in places]


def sample_groups(run: Run, step: int) -> list[Group]:
    """Roll out this process's share of the step's prompts."""
    config, fmt, grpo = run.config, run.engine.fmt, run.config.method == "grpo"
    batch = batch_of(step, config, len(run.train))[rank()::world()]
    # with the epoch: a small data set may repeat a record within the batch, and each time is another draw
    seeds, examples = [seed_of(config.seed, step, i, epoch) for i, epoch in batch], [run.train[i] for i, _ in batch]
    rollouts = generate(run.engine, [prompt for _, prompt in examples], seeds, config.M, config.think_budget,
                        config.answer_budget if grpo else 0)
    groups = []
    for (record, prompt), seed, samples in zip(examples, seeds, rollouts):
        reward = None
        if grpo:  # only an answer that ended can be the gold one: w, too, is the likelihood through the end token
            right = [r.y[-1] == fmt.end and exact_match(fmt.text(r.y), record.answer) for r in samples]
            reward = torch.tensor(right, dtype=torch.float32)
        responses = [respond(r, r.y if grpo else fmt.gold(record.answer), fmt) for r in samples]
        groups.append(Group(record, prompt, samples, responses, reward, seed))
    # the longest first, so that running out of memory shows at once
    return sorted(groups, key=lambda g: -len(g.prompt) - max(len(r.ids) for r in g.responses))


def sum_gradients(model: PreTrainedModel) -> None:
    """Sum .grad over the processes. A parameter that nothing reached gets 0: AdamW would pass over None."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world() > 1:
            dist.all_reduce(p.grad)


def q_of(step: int, config: Config) -> float:
    """The q of a step: from --q at step 0 it moves to --q-end at step --q-steps, linearly, and stays there."""
    return config.q + (config.q_end - config.q) * min(1, step / config.q_steps)


def update(run: Run, groups: list[Group], step: int) -> tuple[list[tuple], dict]:
    """One optimiser step on the mean of the B prompts' surrogate losses; none at step 0, which only measures, and none
    if the gradient's norm is not finite. Returns what `group_gradient` does, and metrics."""
    config = dataclasses.replace(run.config, q=q_of(step, run.config))
    run.optimizer.zero_grad(set_to_none=True)
    results = [group_gradient(run.model, group, config) for group in groups]
    sum_gradients(run.model)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip).item()
    above_eps = None  # what is below, AdamW hardly moves: it divides the mean gradient by its root mean square + eps
    if config.optimizer == "adamw":
        gradients = [p.grad for p in run.model.parameters()]
        above_eps = sum((g.abs() > config.eps).sum() for g in gradients).item() / sum(g.numel() for g in gradients)
    lr = config.lr * min(1, step / max(1, config.warmup))
    if step and math.isfinite(norm):
        for parameters in run.optimizer.param_groups:
            parameters["lr"] = lr
        run.optimizer.step()
    return results, {"q": config.q, "grad_norm": norm, "above_eps": above_eps, "lr": lr}


def train_step(run: Run, step: int) -> dict:
    """Sample, differentiate, update, sync; returns the step's row of metrics.jsonl."""
    clock = [time.perf_counter()]
    groups = sample_groups(run, step)
    clock.append(time.perf_counter())
    results, row = update(run, groups, step)
    if run.model.device.type == "cuda":
        torch.cuda.synchronize()  # the optimiser's time belongs to training
    clock.append(time.perf_counter())
    run.engine.sync(run.model)
    clock.append(time.perf_counter())
    run.step, run.skipped = step, 0 if math.isfinite(row["grad_norm"]) else run.skipped + 1
    run.silent = run.silent + 1 if row["grad_norm"] == 0 and run.config.method != "grpo" else 0
    row = {"step": step} | step_metrics(gather([metrics for *_, metrics in results])) | row
    row["skipped_in_a_row"] = run.skipped
    for name, start, end in zip(("rollout", "train", "sync"), clock, clock[1:]):
        row[f"seconds_{name}"] = round(end - start, 4)
    tokens = run.config.batch_size * (row["sampled_tokens"] + row["trained_tokens"])
    row["tokens_per_second"] = round(tokens / (clock[-1] - clock[0]), 1)
    if rank() == 0 and step % run.config.eval_every == 0:
        append_jsonl(run.out / "samples.jsonl", samples_of(run, groups[0], *results[0][:2]))
    return row


def samples_of(run: Run, group: Group, merit: Tensor, a: Tensor) -> list[dict]:
    """Two decoded rollouts of the longest prompt for samples.jsonl: that of the largest w (GRPO: reward), another."""
    best, fmt = int(merit.argmax()), run.engine.fmt
    return [{"step": run.step, "id": group.record.id, "gold": group.record.answer,
             "log_w" if group.reward is None else "reward": merit[m].item(), "a": a[m].item(),
             "rationale": fmt.tokenizer.decode(group.rollouts[m].z), "answer": fmt.text(group.rollouts[m].y) or None}
            for m in (best, int(best == 0))]


def check_health(run: Run, row: dict) -> None:
    """Say when nothing is learnt; stop when sampler and trainer disagree, or after ten steps that were not finite."""
    gap, last = row["sampler_gap_mean"], checkpoint_of(run.out)
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    if run.silent == 5:
        say(f"five steps without a gradient: at log P = {row['log_P_mean']:.0f} P^(1-q) underflows; a larger --q "
            "helps, or a smaller --lr where log P was near 0 before")
    if run.skipped == 10:
        raise UserError(f"ten steps in a row had a loss or gradient that is not finite: lower --lr; {good}")
    if not run.skipped and gap is not None and (gap > run.config.gap_bound or math.isnan(gap)):
        raise UserError(f"step {run.step}: sampler and trainer disagree by {gap:.3g} nats per token, more than "
                        f"--gap-bound: the sampler has other weights or settings; {good}")


# ---------------------------------------------------------------------------------------------------------------------
# 10. Validation and checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def sample_answers(engine, examples: list[Example], config: Config) -> list[list[str] | None]:
    """`eval_samples` answers to every prompt, as text; None where it was dropped. Seeds depend on the run's seed and
    the prompt's place alone, so eval.py repeats the validation that chose a checkpoint."""
    mine = [(i, prompt) for i, (_, prompt) in enumerate(examples) if prompt][rank()::world()]
    seeds = [seed_of(config.seed, "evaluation", i) for i, _ in mine]
    rollouts = generate(engine, [prompt for _, prompt in mine], seeds, config.eval_samples, config.think_budget,
                        config.answer_budget, scored=False)
    texts = dict(gather([(i, [engine.fmt.text(r.y) for r in group]) for (i, _), group in zip(mine, rollouts)]))
    return [texts.get(i) for i in range(len(examples))]


COUNTERS = ("step", "best", "skipped", "silent")  # of a Run: what a checkpoint keeps
LOGS = ("metrics.jsonl", "samples.jsonl")


def save(run: Run, name: str) -> None:
    """Write the checkpoint folder run.out/name: what transformers and vLLM load, and the trainer's state beside it."""
    def write(folder: Path) -> None:
        """The files of a checkpoint."""
        run.model.save_pretrained(folder)
        run.engine.fmt.tokenizer.save_pretrained(folder)
        counters = {key: getattr(run, key) for key in COUNTERS}
        torch.save(counters | {"optimizer": run.optimizer.state_dict()}, folder / "trainer.pt")

    if rank() == 0:
        write_folder(run.out / name, write)


def checkpoint_of(out: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if there is none."""
    folders = (out / name for name in ("last", "last.old"))
    return next((folder for folder in folders if (folder / "trainer.pt").is_file()), None)


def restore(run: Run, folder: Path) -> None:
    """Continue where the checkpoint stands: optimiser, counters, and the logs cut back to its step."""
    try:
        state = torch.load(folder / "trainer.pt", weights_only=True, mmap=True)
        run.optimizer.load_state_dict(state["optimizer"])
        for key in COUNTERS:
            setattr(run, key, state[key])
    except Exception as error:  # cut off, or another program's
        raise UserError(f"{folder / 'trainer.pt'} is no state of this trainer ({type(error).__name__})") from error
    if run.config.steps < run.step:
        raise UserError(f"--steps {run.config.steps}: the run has done {run.step} already")
    if rank() == 0:
        for log in LOGS:
            cut_log(run.out / log, run.step)


# ---------------------------------------------------------------------------------------------------------------------
# 11. The training loop
# ---------------------------------------------------------------------------------------------------------------------
def train(run: Run) -> None:
    """Step, log, validate and save until `steps` are done or the run is asked to stop. Step 0 measures the start: its
    log P tells what GARL and PAFT will meet, and no weight moves."""
    config = run.config
    run.engine.sync(run.model)
    with tqdm(total=config.steps, initial=run.step, unit="step", dynamic_ncols=True, disable=rank() > 0 or None) as bar:
        for step in range(run.step + 1 if config.resume else 0, config.steps + 1):
            row = train_step(run, step)
            finish_step(run, row)
            bar.update(min(1, step))  # step 0 is none of them
            bar.set_postfix_str(f"loss {row['loss']:.4f}, best maj@{config.eval_samples} {run.best:.1f}%")
            if any(gather([run.stop])):
                break
    if run.skipped:
        return say(f"ended while steps were not finite; the last good checkpoint is {checkpoint_of(run.out)}")
    if run.step % config.eval_every:
        save(run, "last")
    say(f"done: best validation maj@{config.eval_samples} {run.best:.1f}%, checkpoint {run.out / 'best'}"
        if run.step == config.steps else f"stopped after step {run.step}; continue with --resume {run.out}")


def finish_step(run: Run, row: dict) -> None:
    """Log a row. Every `eval_every` steps validate first and save last/, and best/ on a new highest maj@16 (of equals
    the earliest stays). While steps are not finite the model is neither validated nor saved."""
    config, better = run.config, False
    due = row["step"] % config.eval_every == 0 and not run.skipped
    if due:
        start = time.perf_counter()
        answers = sample_answers(run.engine, run.validation, config)
        figures = summarize(answers, [record for record, _ in run.validation])
        row |= {f"val_{name}": percent for name, percent in figures.items()}
        row["seconds_eval"] = round(time.perf_counter() - start, 4)
        maj = row[f"val_maj@{config.eval_samples}"]
        better, run.best = maj > run.best, max(maj, run.best)
    for line in lines_of(row):
        say(line)
    if rank() == 0:
        append_jsonl(run.out / "metrics.jsonl", [row])
    check_health(run, row)
    if better:
        save(run, "best")
    if due:
        save(run, "last")


def lines_of(row: dict) -> Iterator[str]:
    """One aligned line for a step, and one for its validation."""
    shown = {"loss": "9.4f", "log_P_mean": "8.3f", "ess": "6.2f", "reward": "6.3f", "grad_norm": "8.1e",
             "rationale_tokens": "6.1f", "tokens_per_second": "8.0f"}
    cells = [f"{name} {row[name]:{form}}" for name, form in shown.items() if row.get(name) is not None]
    values = [f"{name} {value:5.1f}" for name, value in row.items() if name.startswith("val_")]
    return (" | ".join([f"step {row['step']:4d}", *part]) for part in (cells, values) if part)


# ---------------------------------------------------------------------------------------------------------------------
# 12. Main
# ---------------------------------------------------------------------------------------------------------------------
def parse(argv: Sequence[str] | None = None) -> Config:
    """The settings from the command line; with --resume those of the run, plus the few that may change."""
    parser = Parser(prog="tsallis_rl.py", description=__doc__.split("\n\n")[0])
    add_settings(parser, Config)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        out = user_path(given["resume"])
        if not checkpoint_of(out):
            raise UserError(f"--resume {out}: no run with a checkpoint is there (its folder has config.json and last/)")
        given = resumed(out / "config.json", given, RESUMABLE, Config) | {"out": str(out), "resume": str(out)}
    return resolve(Config(**given))


@torch.no_grad()
def probe(model: PreTrainedModel, fmt: Format, prompt: list[int], answer: str, config: Config) -> None:
    """A prompt and its answer through the model's own logits and through the trainer's path: UserError where they
    differ, as for an encoder, or an output layer that is more than a matrix."""
    y = fmt.gold(answer)
    if max(prompt + y) >= len(model.get_input_embeddings().weight):
        raise UserError(f"--model {config.model}: its tokenizer has ids beyond the model's embeddings")
    ids = torch.tensor([y], device=model.device)
    try:
        with autocast(model, config):
            logits = model(input_ids=torch.tensor([prompt + y], device=model.device), logits_to_keep=len(y) + 1).logits
        theirs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        ours = SharedPrompt(model, prompt, config).log_probs(ids, torch.ones_like(ids, dtype=torch.bool))
        gap = (ours - theirs).abs().mean().item()
    except (AttributeError, TypeError, ValueError, IndexError):  # no keys and values, or no such arguments
        gap = math.nan
    if math.isnan(gap) or gap > config.gap_bound:
        raise UserError(f"--model {config.model}: the trainer's log-probabilities are {gap:.3g} nats from its own: it "
                        "is not a causal model whose output layer is a plain matrix")


def load_model(name: str, device: torch.device) -> tuple[PreTrainedModel, Format]:
    """Model in float32 (bfloat16 weights would lose AdamW's small updates) and its token format."""
    model, tokenizer = load_pretrained(name)
    return model.to(device).eval(), Format.of(tokenizer)  # eval: no dropout, or sampler and trainer would differ


def make_engine(config: Config, path: str, model: PreTrainedModel, fmt: Format,
                examples: list[Example]) -> HFRollouts | VLLMRollouts:
    """The sampler that --rollout names; auto takes vLLM where it can run, and one line says which and why."""
    able, why = vllm_runs_here()
    if config.rollout == "vllm" and not able:
        raise UserError(f"--rollout vllm cannot run here: {why}; use --rollout hf")
    use = config.rollout == "vllm" or (config.rollout == "auto" and able)
    say(f"rollouts by {'vLLM' if use else 'transformers'}: {why if config.rollout == 'auto' else 'as --rollout says'}")
    response = config.think_budget + len(fmt.forced(False)) + config.answer_budget
    longest = max(len(ids) for _, ids in examples) + response
    return VLLMRollouts(path, fmt, config, longest) if use else HFRollouts(model, fmt, config)


def start_run(config: Config, out: Path, device: torch.device) -> Run:
    """Load data, model, sampler and optimiser, or continue the run in `out`."""
    checkpoint = checkpoint_of(out) if config.resume else None
    path = str(checkpoint or config.model)
    fewest = min((n for n in (config.limit, config.eval_limit) if n), default=None)
    splits = load(config.data, "train", config.limit), load(config.data, "validation", fewest)
    for line in cpu_warnings(config.dtype, dataset_name(config.data) != "ledger") if device.type == "cpu" else ():
        say(line)
    model, fmt = load_model(path, device)
    training, validation = (encode(records, config, fmt, positions(model)) for records in splits)
    training = [(record, prompt) for record, prompt in training if prompt]
    prompt, answer = training[0][1], training[0][0].answer
    probe(model, fmt, prompt, answer, config)
    engine = make_engine(config, path, model, fmt, training + validation)
    run = Run(config, out, model, engine, make_optimizer(model, config), training, validation)
    digest = hashlib.sha256(repr((training, validation)).encode()).hexdigest()
    if checkpoint:
        if read_object(out / "config.json").get("data") != digest:
            raise UserError(f"--resume {out}: the records or the tokenizer are not those that it began with")
        restore(run, checkpoint)
    if rank() == 0:
        for log in LOGS if not checkpoint else ():
            cut_log(out / log, -1)  # of a run that ended before its first checkpoint
        about = {"settings": dataclasses.asdict(config), "versions": versions(), "commit": commit(ROOT),
                 "data": digest, "processes": world()}
        write_atomic(out / "config.json", json.dumps(about, indent=2))
    say(f"run {out}: " + ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items() if v is not None))
    shown, rest = fmt.tokenizer.decode(prompt), fmt.tokenizer.decode(fmt.forced(False) + fmt.gold(answer))
    say(f"a sequence: {shown if len(shown) < 200 else shown[:100] + ' [...] ' + shown[-100:]!r} z {rest!r}")
    return run


def run_folder(config: Config) -> contextlib.AbstractContextManager[Path]:
    """The run's folder, locked while the run lives. A run without a checkpoint may be started over in its folder."""
    if config.resume:
        return held_folder(Path(config.resume))
    if config.out:
        if checkpoint_of(user_path(config.out)):
            raise UserError(f"--out {config.out} already holds a run; pass another folder, or --resume {config.out}")
        ours = {"lock", "config.json", *LOGS, "best", "best.new", "best.old", "last.new"}
        return held_folder(user_path(config.out), may_hold=ours)
    q = f"-q{config.q:g}" + (f"to{config.q_end:g}" if config.q_end != config.q else "")
    method = config.method + (q if config.method != "grpo" else "")
    name = f"{dataset_name(config.data)}-{config.start}-{method}-seed{config.seed}"
    return held_folder(Path("runs", name), new=True)


def interrupt(run: Run) -> None:
    """Ctrl-C, SIGTERM, SIGHUP: finish the step and save; a second one stops at once."""
    if run.stop:
        raise KeyboardInterrupt
    run.stop = True
    say("finishing this step, then saving; a second signal stops at once")


def answers_to(config: Config, records: list[Record]) -> list[list[str] | None]:
    """eval.py's sampling: answers of config.model to each record, None where its prompt is too long."""
    model, fmt = load_model(config.model, start_processes())
    examples = encode(records, config, fmt, positions(model))
    engine = make_engine(config, config.model, model, fmt, examples)
    engine.sync(model)
    return sample_answers(engine, examples, config)


def program(argv: Sequence[str] | None) -> None:
    """From the command line to the end of the run."""
    config, device = parse(argv), start_processes()
    if config.batch_size < world():
        raise UserError(f"--batch-size {config.batch_size} leaves some of the {world()} processes without a prompt")
    with run_folder(config) if rank() == 0 else contextlib.nullcontext() as out:
        run = start_run(config, Path(gather([str(out)])[0]), device)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, lambda *_: interrupt(run))
        train(run)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return exit_code(lambda: program(argv))


if __name__ == "__main__":
    code = main()
    if code == 0 and world() > 1:
        dist.destroy_process_group()  # or its threads may abort the process as it ends
    sys.exit(code)
