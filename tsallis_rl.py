"""
Reference implementation of "How Fast Should a Model Commit to Supervision? Training
Reasoning Models on the Tsallis Loss Continuum" (Lin & Ie, arXiv 2604.25907, version 1).

A model reads a prompt x*, samples a rationale z, then writes an answer. The probability
that it writes the gold answer y* is

    P = p(y* | x*) = sum_z p(z | x*) p(y* | x*, z)

The loss has one parameter, q in [0, 1]. q = 0 is reinforcement learning with an exact-match
reward, q = 1 is maximum likelihood:

    l_q = -log_q P = (1 - P^(1-q)) / (1 - q)        (3)    l_0 = 1 - P,  l_1 = -log P
    grad l_q = P^-q grad l_0 = P^(1-q) grad l_1     (5)

GARL estimates the first form of (5): it samples rationales and amplifies by P^-q.
PAFT estimates the second: it resamples the same rationales by how likely they make y*,
fine-tunes on the ones that were drawn, and attenuates by P^(1-q).

    python tsallis_rl.py --q 0.75 --method paft

Sections 2 and 3 of this file are the paper's equations, 8 and 9 its algorithms.
The optimizer, its settings and the prompts are ours: the paper gives none.

Symbols: B prompts in a step, M rollouts of a prompt, K resampled ones; R rows in a batch,
T tokens in a row, S tokens in a cache, V vocabulary, D hidden size, N scored tokens;
w_m = p(y* | x*, z_m) the weight of rollout m, wbar the mean of w over m (it estimates P).
"""
import argparse
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Iterable, Literal, NamedTuple, get_args, get_type_hints

os.environ.setdefault("GOMP_SPINCOUNT", "500")  # or waiting threads stay busy
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# not used: transformers would import them, and fail if they do not fit torch
for name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(name, None)

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM,
                          AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from data import Record, defaults, load
from data.files import (UserError, append_jsonl, exit_code, open_folder, read_json,
                        write_folder, write_text)
from data.verifiers import exact_match, summarize

Ids = list[int]  # token ids


# --- 1. Settings ---
def setting(default, help: str):
    """A field of `Config` with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """All settings of a run. *: the default is in `data.defaults`."""

    # method
    q: float = setting(0.75, "0 is RLVR, 1 the log-likelihood (eq. 3); grpo has none")
    q_end: float | None = setting(None, "move q to this value")
    q_steps: int = setting(40, "steps from --q to --q-end, linearly")
    method: Literal["garl", "garl-score", "paft", "grpo"] = setting(
        "paft", "garl-score has no pathwise term; grpo is for comparison")
    M: int = setting(32, "rollouts per prompt")
    K: int | None = setting(None, "PAFT alone: rationales resampled; None is M")
    # model and data
    data: str = setting("ledger", "ledger (ours), finqa, hotpotqa, musique, finqa:PATH ..., PATH")
    start: Literal["warm", "cold"] = setting("warm", "prompt with or without instructions")
    model: str | None = setting(None, "Hugging Face folder or Hub id*")
    limit: int | None = setting(None, "use only this many records of each split")
    prompt_limit: int = setting(4096, "prompts with more tokens are dropped")
    # sampling
    think_budget: int | None = setting(None, "tokens before </think> is forced*")
    answer_budget: int | None = setting(None, "tokens of a sampled answer*")
    rollout: Literal["auto", "vllm", "hf"] = setting("auto", "auto: vllm on a GPU, else hf")
    gpu_share: float = setting(0.4, "share of the GPU's memory for vLLM")
    # optimization
    steps: int | None = setting(None, "optimizer steps*")
    batch_size: int = setting(8, "prompts per step (B), over all processes")
    lr: float | None = setting(None, "learning rate*")
    warmup: int = setting(5, "steps of linear warm-up")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "without weight decay")
    eps: float = setting(1e-8, "AdamW alone: smaller gradients move little")
    clip: float = setting(1.0, "largest norm of the gradient")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on a GPU")
    token_budget: int = setting(8192, "tokens in a micro-batch; lower it if memory runs out")
    # run
    seed: int = setting(0, "of the data order and every sample")
    out: str | None = setting(None, "folder of the run; None is runs/NAME")
    resume: str | None = setting(None, "continue the run in this folder")
    eval_every: int | None = setting(None, "steps between validations and checkpoints*")
    eval_samples: int = setting(16, "samples per prompt in validation")
    eval_limit: int | None = setting(None, "validate on this many prompts*")

    def __post_init__(self):
        """Check every value, those from a file, too."""
        for name, kind in get_type_hints(Config).items():
            value, allowed = getattr(self, name), get_args(kind) or (kind,)
            # allowed: types, or words. A fraction may be a whole number.
            good = value in allowed or type(value) in allowed or (
                float in allowed and type(value) is int)
            if type(value) in (int, float):
                least = 0 if float in allowed else dict(M=2, steps=0, warmup=0, seed=0).get(name, 1)
                most = 1 if name in ("q", "q_end", "gpu_share") else 2**63
                good &= least <= value <= most
            if not good:
                raise UserError(f"--{name.replace('_', '-')} cannot be {value!r}")


MAY_CHANGE = {"resume", "out", "steps", "rollout", "token_budget", "gpu_share"}  # on resume
GAP_BOUND = {"float32": 1e-3, "bfloat16": 0.2}  # nats a token between sampler and trainer


def absolute(path: str) -> str:
    """A path valid in every folder; ~ is the user's home."""
    return os.path.abspath(os.path.expanduser(path))


def resolve(config: Config) -> Config:
    """Fill in what is None or "auto"; make paths absolute (`defaults` does for data)."""
    preset = defaults(config.data) | {"K": config.M, "q_end": config.q}
    if config.dtype == "auto":
        preset["dtype"] = "bfloat16" if torch.cuda.is_available() else "float32"
    unset = {k for k, v in vars(config).items() if v in (None, "auto")}
    config = replace(config, **{k: preset[k] for k in unset | {"data"} if k in preset})
    folder = absolute(config.model)
    return replace(config, model=folder if os.path.exists(folder) else config.model)


def parse(argv: list[str] | None = None) -> Config:
    """The settings of the command line; with --resume those of the run are the defaults."""
    # without a usage, errors are one line, with exit code 2
    parser = HfArgumentParser(Config, usage=argparse.SUPPRESS, allow_abbrev=False,
                              epilog="* the default depends on --data")
    given = parser.parse_args(argv)
    if given.resume:
        out = absolute(given.resume)
        saved = read_json(f"{out}/config.json").get("settings", {})
        if set(saved) != set(vars(given)) or not last_checkpoint(Path(out)):
            raise UserError(f"--resume {out}: no checkpoint of this version is there")
        parser.set_defaults(**saved)
        given = parser.parse_args(argv)
        changed = [k for k in saved if getattr(given, k) != saved[k] and k not in MAY_CHANGE]
        if changed:
            raise UserError(f"--resume {out}: a run keeps its {', '.join(changed)}")
        given.resume = given.out = out
    return resolve(Config(**vars(given)))


# --- 2. The loss ---
def log_q(u: Tensor | float, q: float) -> Tensor:
    """Tsallis logarithm (1): (u^(1-q) - 1) / (1 - q) for 0 < u <= 1, and log u at q = 1."""
    return -tsallis_loss(torch.as_tensor(u).log(), q)


def tsallis_loss(log_P: Tensor | float, q: float) -> Tensor:
    """Loss (3), elementwise: (1 - P^(1-q)) / (1 - q). Takes log P, as P underflows."""
    log_P = torch.as_tensor(log_P)
    if q == 1:
        return -log_P
    return -torch.expm1((1 - q) * log_P) / (1 - q)  # expm1: exact also for q near 1


# --- 3. The estimators ---
# M rationales z_m ~ p(z | x*) are drawn. w_m = p(y* | x*, z_m) is the likelihood of the
# complete gold answer, through its end token. wbar is the mean of the M weights, and
# wbar_{-m} the mean of the other M - 1.
#
# GARL (7-9, 12), Algorithm 1:
#
#     ghat = -1/(M M^q) sum_m [   c_m           grad log p(z_m | x*)         score function
#                               + w_m / wbar^q  grad log p(y* | x*, z_m) ]   pathwise
#     c_m  = w_m / wbar^q - (wbar_{-m})^(1-q)
#
# PAFT (13, 14), Algorithm 2: draw r_1 .. r_K from the M, with probability w_m / sum w, then
#
#     ghat = -wbar^(1-q)/(K M^q) sum_k grad log p(z_{r_k}, y* | x*)
#
# w_m / wbar^q is at most M^q. The algorithms divide by M^q, (12) and (14) do not. Under SGD
# this acts as a smaller learning rate at larger q.
#
# Every method is a pair (a_m, b_m) in `surrogate_loss`:
#
#     method               a_m                         b_m                      answer y
#     garl                 c_m / (M M^q)               w_m / (wbar^q M M^q)     gold
#     plug-in (no flag)    w_m / (wbar^q M M^q)        same                     gold
#     garl-score           c_m / (M M^q)               0                        gold
#     paft                 wbar^(1-q) n_m / (K M^q)    same; m drawn n_m times  gold
#     grpo                 (r_m - mean r) / std r / M  same; r_m = [y_m = y*]   sampled
#
# They are computed from log w in float64: near q = 1, w underflows long before w_m / wbar^q.
Coefficients = tuple[Tensor, Tensor]


def surrogate_loss(log_pz: Tensor, log_py: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """-sum_m [a_m log p(z_m | x) + b_m log p(y | x, z_m)]. Its gradient is ghat."""
    return -(a * log_pz + b * log_py).sum()


def log_mean(log_w: Tensor) -> Tensor:
    """log wbar: (..., M) -> (..., 1)."""
    return log_w.logsumexp(-1, keepdim=True) - math.log(log_w.shape[-1])


def log_mean_of_others(log_w: Tensor) -> Tensor:
    """log wbar_{-m}: (..., M) -> (..., M). M new sums: the total minus w_m would lose digits."""
    M = log_w.shape[-1]
    diagonal = torch.eye(M, dtype=torch.bool, device=log_w.device)
    others = log_w.unsqueeze(-2).expand(*log_w.shape, M).masked_fill(diagonal, -math.inf)
    return others.logsumexp(-1) - math.log(M - 1)


def garl_coefficients(log_w: Tensor, q: float, baseline: bool = True) -> Coefficients:
    """Gradient-Amplified RL (7-9) with the leave-one-out baseline (12).

    q = 0: Rao-Blackwellised REINFORCE with a leave-one-out baseline; unbiased.
    q = 1: the IWAE gradient. For q > 0 the bias is O(1/M) (Theorem 6.1).
    baseline=False is the plug-in estimator. Its expectation is the same (Prop. 6.2).
    w > 0 even where no sampled answer is right, so b is 0 only by underflow.
    log_w: (..., M), in nats, M >= 2. Returns (a, b) of the same shape.
    """
    M = log_w.shape[-1]
    log_w = log_w.detach().double()
    b = (log_w - q * log_mean(log_w)).exp()  # w_m / wbar^q
    c = b - ((1 - q) * log_mean_of_others(log_w)).exp() if baseline else b
    return c / (M * M**q), b / (M * M**q)


def resample(log_w: Tensor, K: int, generator: torch.Generator | None = None) -> Tensor:
    """PAFT's draw (13): how often each of the M rationales is among the K. (..., M)."""
    M = log_w.shape[-1]
    posterior = log_w.detach().double().softmax(-1)  # w_m / sum w
    drawn = torch.multinomial(posterior.view(-1, M), K, replacement=True, generator=generator)
    return F.one_hot(drawn, M).sum(-2).view(log_w.shape).double()


def paft_coefficients(log_w: Tensor, q: float, n: Tensor) -> Coefficients:
    """Posterior-Attenuated Fine-Tuning (14). n: the counts of `resample`.

    q = 1: EM with a sampled E-step. q = 0: fine-tuning on posterior samples, scaled by P.
    Its mean over the draw is GARL's plug-in estimator, so both have the same expectation
    (D.3); the draw adds variance (D.4). Returns (a, a).
    """
    M, K = log_w.shape[-1], n.sum(-1, keepdim=True)
    a = ((1 - q) * log_mean(log_w.detach().double())).exp() * n / (K * M**q)
    return a, a


def grpo_coefficients(reward: Tensor) -> Coefficients:
    """For comparison: GRPO on sampled answers, reward 0 or 1. reward: (..., M).

    All 0 where the rewards of a prompt agree: a model that never succeeds gets no
    gradient. No KL term, no division by length, no ratio (it is 1 in a batch's only update).
    """
    r = reward.detach().double()
    std = r.std(-1, keepdim=True)
    a = (r - r.mean(-1, keepdim=True)) / std.masked_fill(std == 0, 1) / r.shape[-1]
    return a, a


# --- 4. Several processes (torchrun) ---
def start_processes() -> torch.device:
    """Join the other processes, if any. Returns this one's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every shape
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process. Rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(items: list) -> list:
    """The items of all processes, in every process."""
    parts = [items] * world()
    if world() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(model) -> None:
    """Sum .grad over the processes. A parameter that nothing reached gets 0."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world() > 1:
            dist.all_reduce(p.grad)


def say(text: str) -> None:
    """Print once, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


# --- 5. Prompts and sequences: prompt | z | </think> | "\n\n" | answer | end token ---
# Joined as token ids: decoding could change them. A </think> or an end token that stops a
# sample belongs to z and is scored. Without it, </think> is forced, and not scored.
CLOSE, SEPARATOR = "</think>", "\n\n"


class Template:
    """Turns text into token ids around the rationale, and back. `end` is what the chat
    template puts after an answer, or else the tokenizer's end token. `ends` stop samples;
    those of the model's generation config are among them."""

    def __init__(self, tokenizer, ends: Iterable[int] = ()):
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.close = self.encode(CLOSE)  # ends a rationale
        self.separator = self.encode(SEPARATOR)
        self.special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        if tokenizer.chat_template:
            turns = [dict(role="user", content="Q"), dict(role="assistant", content="WORDS")]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            after = self.encode(text.partition("WORDS")[2])
            self.end = next((i for i in after if i in self.special.values()), self.end)
        if self.end is None:
            raise ValueError("the tokenizer has no end token: p(y* | x*, z) needs one")
        self.ends = {self.end, tokenizer.eos_token_id, *ends} - {None}
        # a rationale also ends with </think>, if that is one token
        self.stop = self.ends | set(self.close) if len(self.close) == 1 else self.ends

    def encode(self, text: str) -> Ids:
        """Text as it is, without a start token."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, text: str) -> Ids:
        """The prompt, up to where the model starts to think."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text)
        turn = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, enable_thinking=True, return_dict=True)
        return chat["input_ids"]

    def gold(self, answer: str) -> Ids:
        """y*. With its end token, or "38" would count for the gold answer "3"."""
        return self.encode(answer) + [self.end]

    def forced(self, z: Ids) -> Ids:
        """The tokens that are put, not sampled, between z and the answer."""
        closed = z[-len(self.close):] == self.close
        return self.separator if closed else self.close + self.separator

    def text(self, y: Ids) -> str:
        """A sampled answer as text, without its end token."""
        return self.tokenizer.decode(y[:-1] if y and y[-1] in self.ends else y).strip()


class Rollout(NamedTuple):
    """What follows a prompt: a sampled rationale, forced tokens, an answer."""
    z: Ids
    log_p: list[float]  # the sampler's log p of z
    forced: Ids
    y: Ids  # GARL, PAFT: the gold answer. GRPO, evaluation: the sampled one.

    @property
    def ids(self) -> Ids:
        """All tokens of the response."""
        return self.z + self.forced + self.y


Example = tuple[Record, Ids]  # a record and its prompt, [] where the sequence is too long


def encode(records: list[Record], config: Config, template: Template, model,
           training: bool) -> list[Example]:
    """The records with their prompts. One that is too long for --prompt-limit or for the
    model's positions, or has one token, becomes []."""
    examples, changed, forced = [], 0, template.forced([])
    vocabulary, length = len(model.get_input_embeddings().weight), positions(model)
    for record in records:
        text = getattr(record, f"{config.start}_prompt")
        prompt, gold = template.prompt(text), template.gold(record.answer)
        control = [token for token in template.special if token in text + record.answer]
        if control or not text.strip() or max(prompt + forced + gold) >= vocabulary:
            raise UserError(f"record {record.id}: no {config.start}_prompt, or with control "
                            f"tokens {control}, or with tokens that the model lacks")
        answer = max(config.answer_budget, len(gold) if training else 0)
        room = length - config.think_budget - len(forced) - answer
        fits = 2 <= len(prompt) <= min(config.prompt_limit, room)  # 2: prompt[:-1] runs alone
        examples.append((record, prompt if fits else []))
        changed += not exact_match(template.text(gold), record.answer)
    kept = sum(bool(prompt) for _, prompt in examples)
    say(f"{kept} of {len(records)} prompts fit; {changed} gold answers change when encoded")
    if not kept:
        raise UserError(f"no prompt fits into {config.prompt_limit} tokens (--prompt-limit) "
                        f"and the model's {length} positions (--think-budget)")
    return examples


def seed_of(*key) -> int:
    """48 bits from (run seed, step, ...): a resumed run draws the same numbers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")


# --- 6. Rollouts ---
# At temperature 1 from the whole vocabulary, as `token_log_probs` scores, up to rounding.
Sampled = tuple[Ids, list[float]]  # ids and their log-probabilities
Row = tuple[Ids, Ids, int]  # a prompt, its response so far, a seed


def generate(engine, prompts: list[Ids], seeds: list[int], n: int, think_budget: int,
             answer_budget: int) -> list[list[Rollout]]:
    """n rollouts of each prompt: a rationale, the forced tokens, then an answer. GARL and
    PAFT need no sampled answer (answer_budget = 0)."""
    if not prompts:
        return []
    template = engine.template
    rows = [(prompt, [], seed + m) for prompt, seed in zip(prompts, seeds) for m in range(n)]
    thoughts = engine.sample(rows, think_budget, template.stop)
    forced = [template.forced(z) for z, _ in thoughts]
    answers = [([], [])] * len(rows)
    if answer_budget:  # its seed is new, or it would repeat the rationale's random numbers
        rows = [(prompt, z + f, seed_of(seed, "answer"))
                for (prompt, _, seed), (z, _), f in zip(rows, thoughts, forced)]
        answers = engine.sample(rows, answer_budget, template.ends)
    rollouts = [Rollout(*thought, f, y) for thought, f, (y, _) in zip(thoughts, forced, answers)]
    return [rollouts[i:i + n] for i in range(0, len(rows), n)]


class HFRollouts:
    """Sampling with transformers, from the trainer's weights."""

    def __init__(self, model, template: Template, config: Config):
        self.model, self.template, self.config = model, template, config

    def sync(self, model) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def sample(self, rows: list[Row], budget: int, stop: set[int]) -> list[Sampled]:
        """Continue each row until a token of `stop`, or for `budget` tokens. They are drawn with
        random numbers from the row's own seed: up to rounding, its batch does not matter."""
        longest = max(len(prompt + so_far) for prompt, so_far, _ in rows) + budget
        # a cached token takes 1/20 of a trained one's memory: 4 budgets fit
        if len(rows) * longest > 4 * self.config.token_budget and len(rows) > 1:
            half = len(rows) // 2
            return self.sample(rows[:half], budget, stop) + self.sample(rows[half:], budget, stop)
        generators = [torch.Generator().manual_seed(seed) for *_, seed in rows]
        uniform = torch.stack([torch.rand(budget, dtype=torch.float64, generator=g)
                               for g in generators]).to(self.model.device)  # (R, T)
        samples, running = [([], []) for _ in rows], [True] * len(rows)
        batch = list(range(len(rows)))  # rows still in the batch
        with autocast(self.model, self.config):
            cache, mask, logits = self.run_prompts(rows)
            for t in range(budget):
                token, log_p = draw(logits, uniform[batch, t])
                for row, i, x in zip(batch, token.tolist(), log_p.tolist()):
                    if running[row]:
                        samples[row][0].append(i)
                        samples[row][1].append(x)
                        running[row] = i not in stop
                keep = [k for k, row in enumerate(batch) if running[row]]
                if not keep or t + 1 == budget:
                    break
                if len(keep) <= 0.75 * len(batch):  # seldom: it copies the cache
                    batch, token, mask = [batch[k] for k in keep], token[keep], mask[keep]
                    cache.batch_select_indices(torch.tensor(keep, device=mask.device))
                mask = F.pad(mask, (0, 1), value=1)
                logits = next_logits(self.model, token[:, None], mask, cache)
        return samples

    def run_prompts(self, rows: list[Row]) -> tuple[Cache, Tensor, Tensor]:
        """The cache of all rows so far, its mask (R, S), and the logits of what is next (R, V).
        Equal prompts run once. So do equal rows: rationales repeat. Each part is padded left."""
        device, cache = self.model.device, Cache(layer_class_to_replicate=CastLayer)
        rows = [(tuple(prompt), tuple(so_far)) for prompt, so_far, _ in rows]
        unique = list(dict.fromkeys(rows))
        prompts = list(dict.fromkeys(prompt for prompt, _ in unique))
        firsts = [prompt[:-1] for prompt in prompts]
        rests = [prompt[-1:] + so_far for prompt, so_far in unique]
        mask, more = (pad([[1] * len(ids) for ids in part], device, "left")
                      for part in (firsts, rests))
        next_logits(self.model, pad(firsts, device, "left"), mask, cache)  # fills the cache
        copies = torch.tensor([prompts.index(prompt) for prompt, _ in unique]).to(device)
        cache.batch_select_indices(copies)
        mask = torch.cat([mask[copies], more], 1)
        logits = next_logits(self.model, pad(rests, device, "left"), mask, cache)
        copies = torch.tensor([unique.index(row) for row in rows]).to(device)
        cache.batch_select_indices(copies)
        return cache, mask[copies], logits[copies]


def pad(rows: list[Ids], device: torch.device, side: str = "right") -> Tensor:
    """Lists of R lengths -> (R, T), with zeros."""
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)


def next_logits(model, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Run ids (R, T) after what is in the cache. Logits of the next token: (R, V)."""
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
                 logits_to_keep=1, **{cache_name(model): cache}).logits[:, -1].float()


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution: (R, V), (R,) -> tokens, log p: (R,), (R,)."""
    log_p = logits.log_softmax(-1)
    cdf = log_p.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).clamp(max=cdf.shape[1] - 1)
    return token[:, 0], log_p.gather(1, token)[:, 0]


class VLLMRollouts:
    """Sampling with vLLM. Weights are copied after every step."""

    def __init__(self, path: str, template: Template, config: Config, max_length: int):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights stay in process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm  # takes seconds
        options = {}
        if not torch.cuda.is_available():  # its CPU build fails at seeds in chunked prefill
            options = {"enable_chunked_prefill": False,
                       "max_num_batched_tokens": max(8192, max_length)}
        if world() > 1:  # one engine in each process
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(
            model=path, dtype=config.dtype, max_model_len=max_length, seed=0,
            gpu_memory_utilization=config.gpu_share, enable_prefix_caching=True,
            # bfloat16 logits would round log p by 0.06 nats
            hf_overrides={"head_dtype": "float32"},
            generation_config="vllm",  # nothing that changes the distribution
            disable_log_stats=True, use_tqdm_on_load=False, **options)
        self.template, self.params = template, vllm.SamplingParams
        self.dtype = getattr(torch, config.dtype)

    def sync(self, model) -> None:
        """Copy the trainer's weights; forget the old keys and values."""
        weights = ((name, w.to(self.dtype)) for name, w in model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise UserError("vLLM kept keys and values of the old weights")

    def sample(self, rows: list[Row], budget: int, stop: set[int]) -> list[Sampled]:
        """As `HFRollouts.sample`."""
        same = dict(max_tokens=budget, temperature=1.0, ignore_eos=True, detokenize=False,
                    stop_token_ids=list(stop), logprobs=0, flat_logprobs=True)
        params = [self.params(seed=seed, **same) for *_, seed in rows]
        contexts = [{"prompt_token_ids": prompt + so_far} for prompt, so_far, _ in rows]
        done = [x.outputs[0] for x in self.llm.generate(contexts, params, use_tqdm=False)]
        return [(list(x.token_ids), list(x.logprobs.logprobs)) for x in done]


# --- 7. The model ---
def autocast(model, config: Config) -> torch.autocast:
    """bfloat16 arithmetic on float32 weights, if it is asked for."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


# what `attention` need not know; `positions` keeps sequences within a sliding window
IGNORED = {"dropout", "is_causal", "sliding_window", "position_ids", "cache_position",
           "use_cache", "output_attentions", "output_router_logits"}


def attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
              scaling: float, **settings):
    """Attention for transformers: (R, H, T, d), (R, G, S, d), (R, G, S, e) -> (R, T, H, e),
    H heads, G heads of keys, d and e their sizes. The T queries are the last of the S keys;
    without a mask it is causal."""
    unknown = {name for name, value in settings.items() if value is not None} - IGNORED
    if unknown:
        raise UserError(f"the model's attention has unknown settings: {sorted(unknown)}")
    if torch.is_autocast_enabled(query.device.type):  # a norm can leave the keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    (R, H, T, d), (G, S) = query.shape, key.shape[1:3]
    flash = query.is_cuda and query.dtype != torch.float32 and value.shape[-1] == d
    if flash and mask is None:
        out = F.scaled_dot_product_attention(query, key, value, causal_lower_right(T, S),
                                             scale=scaling, enable_gqa=True)
    else:  # (R, G, H/G T, d): no copies of keys for their H/G heads. T = 1: mask broadcasts
        if mask is None:
            mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=query.device).tril(S - T)
        rows, mask = query.reshape(R, G, -1, d), mask.repeat(1, 1, H // G if T > 1 else 1, 1)
        out = F.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    return out.reshape(R, H, T, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("lower_right", attention)
# no mask where the caller gives none
AttentionMaskInterface.register("lower_right", lambda *shape, attention_mask=None, **more: (
    None if attention_mask is None else sdpa_mask(*shape, attention_mask=attention_mask, **more)))


def cache_name(model) -> str:
    """The argument that takes the cache; transformers is about to rename it."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class CastLayer(DynamicLayer):
    """A layer's cache in the dtype of the values. A norm can make the keys float32."""

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Add keys and values, (R, G, T, d). Returns all so far."""
        return super().update(key.to(value.dtype), value)


CHUNK = {"cpu": 2**25, "cuda": 2**27}  # logits in memory at once


def output_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, D), (V, D) -> (N, V). On a GPU sums of bfloat16 products stay float32."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden weight^T)[target] in nats. Logits are computed in chunks, since all
    N x V do not fit into memory, and again in the backward pass. That is written by hand,
    because torch.mm(out_dtype=) has no derivative."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """(N, D), (V, D), (N,) -> (N,)."""
        n, W = max(1, CHUNK[hidden.device.type] // len(weight)), weight.to(hidden.dtype)
        log_p, norms = [], []
        for h, t in zip(hidden.split(n), target.split(n)):
            logits = output_logits(h, W)  # (n, V)
            norms.append(logits.logsumexp(-1))
            log_p.append(logits.gather(1, t[:, None])[:, 0] - norms[-1])
        ctx.save_for_backward(hidden, weight, target, torch.cat(norms))
        return torch.cat(log_p)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """d log_p / d logits = onehot(target) - softmax(logits)."""
        hidden, weight, target, norms = ctx.saved_tensors
        n, W = max(1, CHUNK[hidden.device.type] // len(weight)), weight.to(hidden.dtype)
        d_hidden, d_weight = [], torch.zeros_like(weight)
        for h, t, norm, g in zip(*(x.split(n) for x in (hidden, target, norms, grad))):
            d_logits = output_logits(h, W).sub_(norm[:, None]).exp_()  # softmax, (n, V)
            d_logits.mul_(-g[:, None]).scatter_add_(1, t[:, None], g[:, None])
            d_logits = d_logits.to(h.dtype)
            d_hidden.append(d_logits @ W)
            d_weight += d_logits.T @ h
        return torch.cat(d_hidden), d_weight, None


token_log_probs = TokenLogProbs.apply


# --- 8. The gradient of one prompt ---
class SharedPrompt:
    """The keys and values of a prompt, computed once for its M rollouts.

    The gradients of all responses add up in `leaves`, copies of these keys and values.
    `backward` then carries the sum through the prompt, once. This is exact: backward is
    linear in the incoming gradient.
    """

    def __init__(self, model, prompt: Ids, config: Config):
        self.model, self.config, self.dtype = model, config, getattr(torch, config.dtype)
        # the last prompt token runs with the response: it predicts z's first token
        self.length, self.last = len(prompt) - 1, prompt[-1]
        cache = DynamicCache()
        self.run(cache, torch.tensor([prompt[:-1]], device=model.device))
        self.outputs = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        self.leaves = [x.detach().float().requires_grad_() for x in self.outputs]

    def run(self, cache: Cache, ids: Tensor, **settings) -> Tensor:
        """The last hidden states of ids (R, T) after what is in the cache: (R, T, D)."""
        settings[cache_name(self.model)] = cache
        with autocast(self.model, self.config):
            return self.model.base_model(ids, use_cache=True, **settings).last_hidden_state

    def log_probs(self, ids: Tensor, scored: Tensor) -> Tensor:
        """log p of the scored tokens, 0 elsewhere: (R, T), (R, T) -> (R, T). Padding is on
        the right, where no token looks."""
        R, T = ids.shape
        cache = Cache(layers=[CastLayer() for _ in self.leaves[::2]])
        for layer, k, v in zip(cache.layers, self.leaves[::2], self.leaves[1::2]):
            # the rows share one copy until the layer appends to it
            layer.keys, layer.values = (x.to(self.dtype).expand(R, -1, -1, -1) for x in (k, v))
            layer.is_initialized = True
        inputs = F.pad(ids[:, :-1], (1, 0), value=self.last)
        position = torch.arange(self.length, self.length + T, device=ids.device)[None]
        hidden = self.run(cache, inputs, position_ids=position)
        weight = self.model.get_output_embeddings().weight
        log_p = token_log_probs(hidden[scored].to(self.dtype), weight, ids[scored])
        return log_p.new_zeros(ids.shape).masked_scatter(scored, log_p)

    def backward(self) -> None:
        """Carry the gradients of the keys and values back through the prompt."""
        if self.leaves[0].grad is not None:
            gradients = [x.grad.to(y.dtype) for x, y in zip(self.leaves, self.outputs)]
            torch.autograd.backward(self.outputs, gradients)


class Group(NamedTuple):
    """A prompt with its M rollouts."""
    record: Record
    prompt: Ids
    rollouts: list[Rollout]
    reward: Tensor  # (M,), of the sampled answers; 0 where none was sampled
    seed: int


def micro_batches(shared: SharedPrompt, group: Group, rows: Iterable[int]) -> list[list[int]]:
    """Split rollouts, the longest first, so that the prompt and the rows fit the token
    budget. A row also holds a copy of the prompt's keys and values, in which a token takes
    about 1/20 of the memory. A batch has at least one row."""
    length = lambda m: len(group.rollouts[m].ids)
    rows, batches = sorted(rows, key=length, reverse=True), []
    room, copy = shared.config.token_budget - len(group.prompt), len(group.prompt) // 20
    while rows:
        size = max(1, room // (length(rows[0]) + copy))
        batches.append(rows[:size])
        rows = rows[size:]
    return batches


def score(shared: SharedPrompt, group: Group, rows: list[int],
          y_alone: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """log p(z | x) and log p(y | x, z) of R rollouts, (R,) each, and the sampler's gap
    |log p sampler - log p trainer| of each token of z. `y_alone`: z is not scored, and only
    the second value counts. With the gold answer it is log w."""
    rollouts, device = [group.rollouts[m] for m in rows], shared.model.device
    ids = pad([r.ids for r in rollouts], device)  # (R, T)
    # forced tokens, and padding, get no loss
    kinds = pad([[1] * len(r.z) + [0] * len(r.forced) + [2] * len(r.y) for r in rollouts], device)
    is_z, is_y = kinds == 1, kinds == 2
    log_p = shared.log_probs(ids, is_y if y_alone else is_y | is_z)
    sampler = torch.tensor([x for r in rollouts for x in r.log_p], device=device)
    gap = (log_p.detach()[is_z] - sampler).abs()
    return (log_p * is_z).sum(-1), (log_p * is_y).sum(-1), gap


def coefficients(log_w: Tensor, group: Group, config: Config) -> Coefficients:
    """(a, b) of the chosen method, (M,) each. Add a new one above GARL, and in Config."""
    if config.method == "grpo":
        return grpo_coefficients(group.reward)
    if config.method == "paft":
        generator = torch.Generator().manual_seed(seed_of(group.seed, "resample"))
        return paft_coefficients(log_w, config.q, resample(log_w, config.K, generator))
    a, b = garl_coefficients(log_w, config.q)
    return (a, torch.zeros_like(b)) if config.method == "garl-score" else (a, b)


def group_gradient(model, group: Group, config: Config) -> tuple[Tensor, dict]:
    """Add 1/B of the gradient of one prompt's surrogate loss to .grad (Algorithms 1, 2).

    Except for grpo, all rollouts are scored first, without gradients: the coefficients need
    the w of all. Then those with a coefficient that is not 0 run again, with gradients.
    Returns log w (grpo: 0) and the metrics.
    """
    # While this outer context lasts, autocast keeps its bfloat16 copies of the weights. The
    # prompt's pass has to make them: copies made without gradients would train nothing.
    with torch.autocast(model.device.type, enabled=False):
        shared = SharedPrompt(model, group.prompt, config)
        log_w = torch.zeros(config.M, dtype=torch.float64)
        if config.method != "grpo":
            with torch.no_grad():
                for rows in micro_batches(shared, group, range(config.M)):
                    log_w[rows] = score(shared, group, rows, y_alone=True)[1].cpu().double()
            if not log_w.isfinite().all():
                raise UserError("log w is not finite: lower --lr")

        a, b = coefficients(log_w, group, config)
        trained = [m for m in range(config.M) if a[m] != 0 or b[m] != 0]
        gaps = [torch.zeros(0)]
        for rows in micro_batches(shared, group, trained):
            log_pz, log_py, gap = score(shared, group, rows)
            loss = surrogate_loss(log_pz, log_py, a[rows].to(log_pz), b[rows].to(log_pz))
            (loss / config.batch_size).backward()
            gaps.append(gap.cpu())
        shared.backward()
    return log_w, prompt_metrics(group, log_w, trained, torch.cat(gaps), config)


def prompt_metrics(group: Group, log_w: Tensor, trained: list[int], gap: Tensor,
                   config: Config) -> dict:
    """What is logged about a prompt. README.md explains each name."""
    row = {"rationale_tokens": fmean(len(r.z) for r in group.rollouts),
           "trained": len(trained) / config.M}
    if len(gap):
        row["sampler_gap"] = gap.mean().item()
    if config.method == "grpo":
        reward = group.reward.mean().item()
        return row | {"loss": 1 - reward, "reward": reward}
    log_P = log_mean(log_w).item()
    a, b = garl_coefficients(log_w, config.q)  # GARL's, whatever the method
    return row | {
        "loss": tsallis_loss(log_P, config.q).item(),
        "log_P": log_P,
        "ess": 1 / log_w.softmax(-1).square().sum().item(),  # (sum w)^2 / sum w^2
        "effective_reward": config.M * b.max().item(),  # max w_m / wbar^q / M^q, Figure 3
        "amplified_advantage": config.M * a.max().item(),  # max c_m / M^q, Figure 3
    }


# --- 9. One step ---
@dataclass
class Run:
    """All that a run consists of."""
    config: Config
    out: Path
    model: torch.nn.Module
    engine: HFRollouts | VLLMRollouts
    optimizer: torch.optim.Optimizer
    train: list[Example]
    validation: list[Example]
    step: int = 0  # optimizer steps done
    best: float = -1.0  # highest validation maj@n so far
    best_step: int = 0


def make_optimizer(model, config: Config) -> torch.optim.Optimizer:
    """AdamW or SGD, without weight decay."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), config.lr)
    return torch.optim.AdamW(model.parameters(), config.lr, eps=config.eps, weight_decay=0,
                             fused=True)


def q_of(step: int, config: Config) -> float:
    """q at a step: linear from --q at step 0 (no update) to --q-end at --q-steps."""
    return config.q + (config.q_end - config.q) * min(1, step / config.q_steps)


def batch_of(step: int, config: Config, size: int) -> list[tuple[int, int]]:
    """(epoch, index) of the B prompts of a step. Each epoch is another permutation."""
    batch, B = [], config.batch_size
    for epoch, place in (divmod(i, size) for i in range((step - 1) * B, step * B)):
        order = random.Random(seed_of(config.seed, "epoch", epoch)).sample(range(size), size)
        batch.append((epoch, order[place]))
    return batch


def sample_groups(run: Run, step: int) -> list[Group]:
    """The rollouts of this process's prompts, the longest first: if memory does not suffice,
    this shows at once."""
    config, template = run.config, run.engine.template
    batch = batch_of(step, config, len(run.train))[rank()::world()]
    seeds = [seed_of(config.seed, step, i, epoch) for epoch, i in batch]
    examples, grpo = [run.train[i] for _, i in batch], config.method == "grpo"
    samples = generate(run.engine, [prompt for _, prompt in examples], seeds, config.M,
                       config.think_budget, config.answer_budget if grpo else 0)
    groups = []
    for (record, prompt), seed, rollouts in zip(examples, seeds, samples):
        # an answer without its end token is no answer
        reward = [bool(r.y) and r.y[-1] in template.ends
                  and exact_match(template.text(r.y), record.answer) for r in rollouts]
        if not grpo:
            rollouts = [r._replace(y=template.gold(record.answer)) for r in rollouts]
        groups.append(Group(record, prompt, rollouts, torch.tensor(reward).double(), seed))
    length = lambda group: len(group.prompt) + max(len(r.ids) for r in group.rollouts)
    return sorted(groups, key=length, reverse=True)


def train_step(run: Run, step: int) -> dict:
    """Sample, differentiate, update, sync. Returns the step's metrics."""
    config = replace(run.config, q=q_of(step, run.config))
    start = time.perf_counter()
    groups = sample_groups(run, step)
    sampled = time.perf_counter()
    run.optimizer.zero_grad()
    results = [group_gradient(run.model, group, config) for group in groups]
    row = mean_of(gather([metrics for _, metrics in results]))
    gap = row.get("sampler_gap", 0)
    if not gap <= GAP_BOUND[config.dtype]:  # also where it is not a number
        raise UserError(f"sampler and trainer differ by {gap:.2g} nats a token: their weights "
                        "differ, or the model changes its logits after the output matrix")
    sum_gradients(run.model)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip).item()
    lr = config.lr * min(1, step / max(1, config.warmup))
    if math.isfinite(norm):  # otherwise the step is skipped
        run.optimizer.param_groups[0]["lr"] = lr
        run.optimizer.step()
    run.engine.sync(run.model)
    run.step = step
    if rank() == 0 and step % config.eval_every == 0:
        group, decode = groups[0], run.engine.template.tokenizer.decode
        append_jsonl(run.out / "samples.jsonl", [
            {"step": step, "gold": group.record.answer, "rationale": decode(r.z),
             "scored answer": decode(r.y), "log_w": log_w}
            for r, log_w in zip(group.rollouts[:2], results[0][0].tolist())])
    # AdamW divides by the gradient's size + eps: below eps a weight hardly moves
    above = [(p.grad.abs() > config.eps).sum().item() for p in run.model.parameters()]
    adamw = config.optimizer == "adamw" and math.isfinite(norm)
    return row | {"q": config.q, "lr": lr, "grad_norm": norm, "seconds_rollout": sampled - start,
                  "seconds_train": time.perf_counter() - sampled,
                  "above_eps": sum(above) / run.model.num_parameters() if adamw else None}


def mean_of(rows: list[dict]) -> dict:
    """The mean of each metric over the prompts that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


# --- 10. Validation and checkpoints ---
def sample_answers(engine, examples: list[Example], config: Config) -> list[list[str] | None]:
    """`eval_samples` answers to every prompt; None for one that was too long. Seeds depend
    on --seed and the prompt's place alone: eval.py can repeat a validation."""
    mine = [(i, prompt) for i, (_, prompt) in enumerate(examples) if prompt][rank()::world()]
    seeds = [seed_of(config.seed, "evaluation", i) for i, _ in mine]
    rollouts = generate(engine, [prompt for _, prompt in mine], seeds, config.eval_samples,
                        config.think_budget, config.answer_budget)
    texts = [[engine.template.text(r.y) for r in group] for group in rollouts]
    answers = dict(gather([(i, text) for (i, _), text in zip(mine, texts)]))
    return [answers.get(i) for i in range(len(examples))]


def validate(run: Run) -> dict:
    """p@1, p@n and maj@n on the validation split, in percent."""
    answers = sample_answers(run.engine, run.validation, run.config)
    values = summarize(answers, [record for record, _ in run.validation])
    return {f"val_{name}": value for name, value in values.items()}


def save(run: Run, name: str) -> None:
    """Write a Hugging Face checkpoint with the trainer's state. If the process is killed,
    the old or the new one is whole."""
    def write(folder: Path) -> None:
        """The files of a checkpoint."""
        run.model.save_pretrained(folder)
        run.engine.template.tokenizer.save_pretrained(folder)
        state = {"step": run.step, "best": run.best, "best_step": run.best_step}
        torch.save(state | {"optimizer": run.optimizer.state_dict()}, folder / "trainer.pt")

    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise UserError(f"step {run.step}: weights are not finite, and not saved; lower --lr")
    if rank() == 0:
        write_folder(run.out / name, write)


def last_checkpoint(out: Path) -> Path | None:
    """`last`, or `last.old` if the process was killed between two renamings."""
    return next((x for x in (out / "last", out / "last.old") if (x / "trainer.pt").is_file()), None)


def restore(run: Run, folder: Path) -> None:
    """Take the trainer's state, and cut the logs back to its step, and to whole lines."""
    state = torch.load(folder / "trainer.pt", weights_only=True)
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.best, run.best_step = state["step"], state["best"], state["best_step"]
    for name in ("metrics.jsonl", "samples.jsonl") if rank() == 0 else ():
        append_jsonl(run.out / name, [])  # makes it, if there is none yet
        lines = (run.out / name).read_text().splitlines(keepends=True)
        kept = (x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= run.step)
        write_text(run.out / name, "".join(kept))


# --- 11. The training loop ---
def positions(model) -> int:
    """How many tokens the model sees at once."""
    layers = DynamicCache(config=model.config).layers
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    return min([getattr(model.config, "max_position_embeddings", None) or 10**6, *windows])


def load_model(path: str, device: torch.device):
    """A model in float32 (bfloat16 would lose AdamW's small updates), and its template.
    UserError, with the library's reason, for what cannot be trained."""
    for name in ("transformers", "huggingface_hub"):  # the error alone says enough
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True)
        ends = model.generation_config.eos_token_id or []
        template = Template(tokenizer, ends if isinstance(ends, list) else [ends])
        layers = DynamicCache(config=model.config).layers  # is_sliding is None: no attention
        if not model._supports_attention_backend or any(x.is_sliding is None for x in layers):
            raise ValueError("transformers cannot replace its attention, or it has none")
        model.set_attn_implementation("lower_right")
        if report["missing_keys"] or not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError(f"weights are not finite, or missing: {report['missing_keys']}")
    except Exception as error:  # every library has its own errors
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model {path}: {type(error).__name__}: {reason}") from error
    # for checkpoints: end tokens, and no sampling settings
    model.generation_config = GenerationConfig(eos_token_id=sorted(template.ends))
    return model.to(device).eval(), template  # dropout would change what is scored


def make_engine(config: Config, path: str, model, template: Template, examples: list[Example]):
    """The sampler that --rollout names."""
    vllm = torch.cuda.is_available() and importlib.util.find_spec("vllm")
    if config.rollout == "hf" or (config.rollout == "auto" and not vllm):
        return HFRollouts(model, template, config)
    longest = max(len(prompt) for _, prompt in examples)
    rest = config.think_budget + len(template.forced([])) + config.answer_budget
    try:
        return VLLMRollouts(path, template, config, longest + rest)
    except Exception as error:
        raise UserError(f"no vLLM: use --rollout hf or another --gpu-share ({error})")


def start_run(config: Config, out: Path, device: torch.device) -> Run:
    """Load everything. A run that is shorter than --eval-every is validated at its end."""
    limit = min((n for n in (config.limit, config.eval_limit) if n), default=None)
    records = load(config.data, "train", config.limit), load(config.data, "validation", limit)
    about = {"settings": asdict(config),
             "data": hashlib.sha256(repr(records).encode()).hexdigest()}
    checkpoint = last_checkpoint(out) if config.resume else None
    if checkpoint and read_json(out / "config.json").get("data") != about["data"]:
        raise UserError(f"--resume {out}: its records have changed")
    path = str(checkpoint or config.model)
    model, template = load_model(path, device)
    training = encode(records[0], config, template, model, training=True)
    training = [example for example in training if example[1]]
    validation = encode(records[1], config, template, model, training=False)
    engine = make_engine(config, path, model, template, training + validation)
    config = replace(config, eval_every=min(config.eval_every, config.steps or 1))
    run = Run(config, out, model, engine, make_optimizer(model, config), training, validation)
    if checkpoint:
        restore(run, checkpoint)
    if rank() == 0:
        write_text(out / "config.json", json.dumps(about, indent=2))
    shown = training[0][1] + template.forced([]) + template.gold(training[0][0].answer)
    say(f"run {out} on {device}, {type(engine).__name__}, settings in config.json\n"
        f"a sequence without z: ... {template.tokenizer.decode(shown)[-60:]!r}")
    return run


@contextmanager
def stop_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP make longer (not SIGHUP under nohup)."""
    stop, numbers = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda *_: stop.append(True)) for n in numbers
              if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_folder(config: Config) -> Path:
    """--out, or a name made of the settings."""
    data = Path(config.data.split(":")[0]).stem
    q = "" if config.method == "grpo" else f"-q{config.q:g}"
    name = f"{data}-{config.start}-{config.method}{q}-seed{config.seed}"
    return Path(absolute(config.out or f"runs/{name}"))


def console_line(row: dict) -> str:
    """What a step prints."""
    forms = {"loss": ".4f", "log_P": ".2f", "ess": ".1f", "reward": ".3f"}
    forms |= {name: ".1f" for name in row if name.startswith("val_")}
    values = [f"{name} {row[name]:{form}}" for name, form in forms.items() if name in row]
    return f"step {row['step']:3d} | " + " | ".join(values)


def main(argv: list[str] | None = None) -> None:
    """Train. Step 0 validates the model as it comes; a step s > 0 is an update."""
    config, device = parse(argv), start_processes()
    out = run_folder(config)
    folder = open_folder(out, new=not config.resume) if rank() == 0 else nullcontext()
    with folder, stop_signals() as stop:
        run = start_run(config, out, device)
        first = run.step + 1 if config.resume else 0
        for step in tqdm(range(first, config.steps + 1), disable=rank() > 0 or None):
            row = {"step": step} | (train_step(run, step) if step > 0 else {})
            due = step % run.config.eval_every == 0
            if due:
                row |= validate(run)
            if rank() == 0:
                append_jsonl(out / "metrics.jsonl", [row])
            say(console_line(row))
            accuracy = row.get(f"val_maj@{config.eval_samples}", -1)
            if accuracy > run.best:
                run.best, run.best_step = accuracy, step
                save(run, "best")
            ends = any(gather(stop))
            if due or step == config.steps or ends:
                save(run, "last")
            if ends:
                break
    say(f"{run.step} of {config.steps} steps done; go on with --resume {out} --steps N\n"
        f"validation was best at step {run.best_step}: {out}/best")


if __name__ == "__main__":
    code = exit_code(main)
    if code == 0 and world() > 1:
        dist.destroy_process_group()  # or its threads may abort the process as it ends
    sys.exit(code)
