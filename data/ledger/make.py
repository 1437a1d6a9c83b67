"""
Make `ledger`, FinQA in miniature: the three splits and the lab model, in data/ledger.

    python data/ledger/make.py                 # everything, in place: about 10 minutes on two cores
    python data/ledger/make.py --out DIR       # somewhere else
    python data/ledger/make.py --form '[[N]]' --out DIR     # only the splits, with 23 as [[23]]

The task: a table of three items and two years, a question about one of them, a numeric answer.

    item: 2019 | 2018
    sales: 97 | 52                             rationale      costs: 61-38=23
    costs: 61 | 38                             answer         23
    rent: 44 | 17
    costs: change from 2018 to 2019?

The lab model has Qwen3's architecture, about one million parameters and its own small tokenizer.
It is pretrained on a mixture of rationales. Most of them are wrong, and wrong in the same way, so
that a majority vote does not find the truth before reinforcement does:

    RIGHT         of the rationales read the item asked for                     costs: 61-38=23
    SLIP          read it, with the other operator                              costs: 61+38=99
    the others    read the first item, whatever was asked                       sales: 97-52=45

One question in ten is about the first item, where habit and truth agree. The answer repeats the
rationale's result: in digits after the warm prompt, which asks for digits, and in words ("twenty
three") after the cold prompt, which is the bare problem. So at a cold start a gold answer has a
probability of about 1e-6 (geometric mean over problems), and a sample hardly ever shows one.
The shares are those of the training text. The finished model reads the right row in about a
quarter of its rationales and takes the right operator in nine of ten. `report` prints what it
does: how far pretraining gets depends on the seeds, and may depend on the machine.

Contents: 1 problems and records, 2 tokenizer, 3 training text, 4 model and pretraining, 5 report,
6 main.
"""
import argparse
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# Text needs none of these, and a build that does not match torch breaks transformers' import.
for absent in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(absent, None)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)

# --- 1. Problems and records ----------------------------------------------------------
SIZES = {"train": 2000, "validation": 100, "test": 200}
ITEMS = "sales costs rent wages taxes fees loans debt cash stock grants fuel".split()
YEARS = range(2010, 2024)
FIRST = 0.10  # share of questions about the first item
TASK = "Read the table, think, then answer in digits.\n\n"


@dataclass(frozen=True)
class Problem:
    """Three `rows` of (item, amount in `year` + 1, amount in `year`). The question asks `row` for
    `op`: '-' or '+'."""
    year: int
    rows: tuple[tuple[str, int, int], ...]
    row: int
    op: str

    def solve(self, row: int, op: str) -> tuple[str, int]:
        """The rationale that reads `row` and applies `op`: ("costs: 61-38=23", 23)."""
        item, new, old = self.rows[row]
        result = new - old if op == "-" else new + old
        return f"{item}: {new}{op}{old}={result}", result

    @property
    def answer(self) -> str:
        """The gold answer y*, in digits."""
        return str(self.solve(self.row, self.op)[1])

    @property
    def table(self) -> str:
        """One line per item, the later year first."""
        lines = [("item", self.year + 1, self.year), *self.rows]
        return "\n".join(f"{item}: {new} | {old}" for item, new, old in lines)

    @property
    def cold_prompt(self) -> str:
        """The linearised problem alone."""
        old, new = self.year, self.year + 1
        asked = f"change from {old} to {new}?" if self.op == "-" else f"total of {old} and {new}?"
        return f"{self.table}\n{self.rows[self.row][0]}: {asked}"

    @property
    def warm_prompt(self) -> str:
        """Task description and form of the answer in natural language, then the problem."""
        return TASK + self.cold_prompt


def draw_problem(rng: random.Random) -> Problem:
    """A random problem whose gold answer is no substring of any wrong result.

    Amounts have two digits and grow by at least 10, so every result has two or three digits.
    """
    while True:
        rows = []
        for item in rng.sample(ITEMS, 3):
            old = rng.randint(10, 88)
            rows.append((item, rng.randint(old + 10, 99), old))
        row = 0 if rng.random() < FIRST else rng.randint(1, 2)
        problem = Problem(rng.choice(YEARS), tuple(rows), row, rng.choice("-+"))
        wrong = [(r, op) for r in range(3) for op in "-+" if (r, op) != (row, problem.op)]
        if not any(problem.answer in str(problem.solve(*other)[1]) for other in wrong):
            return problem


def make_splits(seed: int = 0) -> dict[str, list[Problem]]:
    """The problems of every split; no prompt occurs twice."""
    rng, drawn = random.Random(seed), {}
    while len(drawn) < sum(SIZES.values()):
        problem = draw_problem(rng)
        drawn.setdefault(problem.cold_prompt, problem)
    problems = iter(drawn.values())
    return {split: [next(problems) for _ in range(size)] for split, size in SIZES.items()}


def write_splits(splits: dict[str, list[Problem]], out: Path, form: str = "N") -> None:
    """One JSONL file per split, with the fields of `Record` in data/__init__.py. form: the text of
    the answer, in which N stands for the number."""
    for split, problems in splits.items():
        lines = [json.dumps({"id": f"ledger-{split}-{index}", "warm_prompt": problem.warm_prompt,
                             "cold_prompt": problem.cold_prompt,
                             "answer": form.replace("N", problem.answer), "aliases": []})
                 for index, problem in enumerate(problems)]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- 2. Tokenizer ---------------------------------------------------------------------
CONTEXT = 1024  # tokens
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]  # not special in Qwen3 either: decoding keeps them
# One piece per match: a year, a digit, a word, "\n\n", "\n", another character. A piece takes the
# space before it along (a sign also the one behind it). A digit stays alone.
PIECES = r" ?20[12]\d(?!\d)|\p{N}| ?\p{L}+|\n\n|\n| ?[^\s\p{L}\p{N}] ?|\s"
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """English words of 0 <= number < 200: 123 becomes 'one hundred twenty three'."""
    if number >= 100:
        return "one hundred" + (" " + in_words(number - 100) if number > 100 else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (" " + ONES[number % 10] if number % 10 else "")


def make_tokenizer(seed: int = 1) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Every word of the task, every year and "\\n\\n" is one token; any other text
    can be encoded, too."""
    rng = random.Random(seed)
    problems = [draw_problem(rng) for _ in range(2000)]
    corpus = [f"{problem.warm_prompt}\n\n{problem.solve(0, '-')[0]}\n" for problem in problems]
    corpus += 2 * [f"user\nassistant\nsystem\n{in_words(number)}\n\n" for number in range(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)  # stops when every piece of the corpus is one token
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=TEMPLATE, model_max_length=CONTEXT, clean_up_tokenization_spaces=False)


def chat(tokenizer, prompt: str) -> str:
    """The prompt inside the chat template, up to where the model begins."""
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True,
                                         enable_thinking=True, tokenize=False)


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """Ids of every text, right-padded. Prompts of one kind have the same length, so only responses
    are padded."""
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]


# --- 3. Training text -----------------------------------------------------------------
# First arithmetic, then reading, then the mixture. Every draw is (prompts, responses): the ids
# of `size` prompts, and of `each` responses to every one of them, in the order of the prompts.
RIGHT, SLIP = 0.15, 0.12  # see the top


def draw_sums(tokenizer, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Arithmetic alone: "<think>\\ncosts: 61-38=" is a prompt, "23\\n</think>" its one response."""
    problems = (draw_problem(rng) for _ in range(size))
    sums = [problem.solve(rng.randrange(3), rng.choice("-+"))[0].split("=") for problem in problems]
    return (encode(tokenizer, [f"<think>\n{left}=" for left, _ in sums]),
            encode(tokenizer, [f"{result}\n</think>" for _, result in sums]))


def draw_readings(tokenizer, size: int, each: int,
                  rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Reading alone: a table is a prompt. Its one response is `each` rationales about random rows
    and operators."""
    problems = [draw_problem(rng) for _ in range(size)]
    line = lambda problem: problem.solve(rng.randrange(3), rng.choice("-+"))[0] + "\n"
    lines = ["".join(line(problem) for _ in range(each)) for problem in problems]
    tables = [problem.table + "\n" for problem in problems]
    return encode(tokenizer, tables), encode(tokenizer, lines)


def draw_mixture(tokenizer, size: int, each: int, warm: bool, held_out: set[str],
                 rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """The base policy: chat prompts, none of them held out, and `each` responses of the mixture to
    every one."""
    prompts, responses = [], []
    while len(prompts) < size:
        problem = draw_problem(rng)
        if problem.cold_prompt not in held_out:
            prompts.append(chat(tokenizer, problem.warm_prompt if warm else problem.cold_prompt))
            responses += [draw_response(problem, warm, rng) + tokenizer.eos_token
                          for _ in range(each)]
    return encode(tokenizer, prompts), encode(tokenizer, responses)


def draw_response(problem: Problem, warm: bool, rng: random.Random) -> str:
    """One rationale of the mixture and the answer that it leads to."""
    chance = rng.random()
    row = problem.row if chance < RIGHT + SLIP else 0
    op = {"-": "+", "+": "-"}[problem.op] if RIGHT <= chance < RIGHT + SLIP else problem.op
    rationale, result = problem.solve(row, op)
    return f"<think>\n{rationale}\n</think>\n\n{result if warm else in_words(result)}"


# --- 4. Model and pretraining ---------------------------------------------------------
def make_model(tokenizer, seed: int = 2) -> Qwen3ForCausalLM:
    """A random Qwen3 model of about one million parameters. vLLM's CPU attention takes head sizes
    from 32."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def response_log_probs(model, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """log p of every response token given what is before it, 0 at padding: (B R, T) from ids (B, S)
    and (B R, T). A prompt runs once; its keys and values are repeated for its R responses."""
    each = len(responses) // len(prompts)
    cache = DynamicCache(config=model.config)
    hidden = model.model(input_ids=prompts, past_key_values=cache).last_hidden_state
    last = hidden[:, -1:].repeat_interleave(each, 0)  # predicts the first token of the response
    cache.batch_repeat_interleave(each)
    hidden = model.model(input_ids=responses, past_key_values=cache).last_hidden_state[:, :-1]
    logits = model.lm_head(torch.cat([last, hidden], 1))  # (B R, T, V)
    log_p = logits.float().log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    return log_p.masked_fill(responses == model.config.pad_token_id, 0.0)


def pretrain(model, stages: list[tuple[str, Callable, int]], lr: float = 0.02) -> None:
    """Maximum likelihood of the responses. A stage is (name, draw, steps), and draw(step) gives
    (prompts, responses).

    Muon at `lr` for the matrices, AdamW at `lr` / 8 for embeddings and norms. The rate falls in
    the last stage only. (On readings alone, 150 steps took the loss to 0.48; AdamW for
    everything, at 2e-3, took it to 1.25.)
    """
    started, pad, last = time.time(), model.config.pad_token_id, stages[-1][2]
    matrices = {name: p for name, p in model.named_parameters()
                if p.ndim == 2 and "embed" not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers = [torch.optim.Muon(matrices.values(), lr=lr, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=lr / 8, betas=(0.9, 0.98), weight_decay=0.0)]
    total = sum(steps for _, _, steps in stages)
    falling = lambda step: 0.5 - 0.5 * math.cos(math.pi * min(1.0, (total - step) / last))
    rate = lambda step: min((step + 1) / 20, falling(step))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    for name, draw, steps in stages:
        for step in range(1, steps + 1):
            prompts, responses = draw(step)
            loss = -response_log_probs(model, prompts, responses).sum() / (responses != pad).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            model.zero_grad()
            if step % 50 == 0 or step == steps:
                seconds = time.time() - started
                print(f"{name:8s} {step:4d}/{steps}  loss {loss.item():.4f}  {seconds:4.0f} s",
                      flush=True)


# --- 5. Report ------------------------------------------------------------------------
@torch.no_grad()
def sample(model, tokenizer, prompts: torch.Tensor, n: int) -> list[str]:
    """`n` whole responses to every prompt at temperature 1, in the prompts' order."""
    rows = prompts.repeat_interleave(n, 0)
    out = model.generate(rows, attention_mask=torch.ones_like(rows),
                         do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=32)
    texts = tokenizer.batch_decode(out[:, prompts.shape[1]:])
    return [text.replace(tokenizer.pad_token, "") for text in texts]


@torch.no_grad()
def log_gold(model, tokenizer, prompts: torch.Tensor, rationales: list[str],
             golds: list[str]) -> torch.Tensor:
    """log w = log p(gold answer and end token | prompt, rationale), one entry per rationale."""
    texts = [f"{rationale}</think>\n\n{gold}{tokenizer.eos_token}"
             for rationale, gold in zip(rationales, golds)]
    responses = encode(tokenizer, texts)
    close = responses == tokenizer.convert_tokens_to_ids("</think>")
    separator = 1 + close.int().argmax(1, keepdim=True)
    answer = torch.arange(responses.shape[1]) > separator  # with its end token; padding scores 0
    return (response_log_probs(model, prompts, responses) * answer).sum(1)


def is_true(rationale: str) -> bool:
    """Whether a rationale states a true equation, such as 'costs: 61-38=23'."""
    found = re.search(r": (\d+)([-+])(\d+)=(\d+)\n$", rationale)
    if found is None:
        return False
    left, op, right, result = found.groups()
    return int(result) == int(left) + (int(right) if op == "+" else -int(right))


def percent(flags: list[bool]) -> float:
    """Share of true flags."""
    return 100 * sum(flags) / len(flags)


def report(model, tokenizer, problems: list[Problem], warm: bool, n: int = 16,
           seed: int = 4) -> dict[str, float]:
    """What the policy does with `n` samples of every problem: shares in percent, P and log P.

    An answer is correct if the gold is a substring of it. P is the probability of the gold answer
    with its end token, estimated by the mean of w over the same `n` rationales.
    """
    model.eval()
    torch.manual_seed(seed)
    texts = [problem.warm_prompt if warm else problem.cold_prompt for problem in problems]
    prompts = encode(tokenizer, [chat(tokenizer, text) for text in texts])
    parts = [text.partition("</think>") for text in sample(model, tokenizer, prompts, n)]
    rationales = [before for before, _, _ in parts]
    answers = [after.strip().removesuffix(tokenizer.eos_token) for _, _, after in parts]
    asked = [problem for problem in problems for _ in range(n)]
    log_w = log_gold(model, tokenizer, prompts, rationales, [problem.answer for problem in asked])
    log_P = log_w.view(-1, n).logsumexp(1) - math.log(n)
    right = [problem.answer in answer for problem, answer in zip(asked, answers)]
    groups = [slice(start, start + n) for start in range(0, len(asked), n)]
    votes = [Counter(answers[group]).most_common(1)[0][0] for group in groups]
    return {"p@1": percent(right), f"p@{n}": percent([any(right[group]) for group in groups]),
            f"maj@{n}": percent([problem.answer in vote for problem, vote in zip(problems, votes)]),
            "right rationales": percent([p.solve(p.row, p.op)[0] in text
                                         for p, text in zip(asked, rationales)]),
            "true equations": percent([is_true(text) for text in rationales]),
            "closed rationales": percent([bool(closed) for _, closed, _ in parts]),
            "P mean": log_P.exp().mean().item(), "P max": log_P.exp().max().item(),
            "log P mean": log_P.mean().item(), "log P min": log_P.min().item()}


# --- 6. Main --------------------------------------------------------------------------
def save(model, tokenizer, folder: Path) -> None:
    """Model and tokenizer as Hugging Face files that transformers 4, 5 and vLLM load, without
    generation settings."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class that 4 does not have; both have this one
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    """Write the splits and the model, and print what its base policy does on the validation
    split."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write")
    parser.add_argument("--form", help="only the splits, with this text for N; needs --out")
    given = parser.parse_args()
    if given.form is not None and ("N" not in given.form or given.out == parser.get_default("out")):
        parser.error("--form needs an N in it, and --out for another folder than the shipped one")
    out, splits = given.out, make_splits()
    out.mkdir(parents=True, exist_ok=True)
    write_splits(splits, out, given.form or "N")
    if given.form is not None:
        return
    held_out = {problem.cold_prompt for problems in splits.values() for problem in problems}
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    rng = random.Random(3)
    pretrain(model, [
        ("sums", lambda step: draw_sums(tokenizer, 128, rng), 150),
        ("readings", lambda step: draw_readings(tokenizer, 32, 6, rng), 500),
        ("mixture", lambda step: draw_mixture(tokenizer, 32, 4, step % 2 == 0, held_out, rng),
         500)])
    save(model, tokenizer, out / "model")
    for start in ("warm", "cold"):
        print(f"{start} start, validation:")
        for name, value in report(model, tokenizer, splits["validation"], start == "warm").items():
            print(f"  {name:18s} {value:10.3g}", flush=True)


if __name__ == "__main__":
    main()
