"""The path on a GPU, run without one: the kernels that Qwen3-0.6B takes, and its memory.

`group_gradient` runs with fake tensors: they have shapes, types and storages, but no numbers.
They say that they are on a GPU. A trace does not show whether the kernels work, how fast they
are, memory lost to fragmentation, or vLLM's engine with its own share of the card.
"""
import math
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.attention.bias as bias
import torch.nn.functional as F
from bench import QWEN3
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

import tsallis_rl
from tsallis_rl import Config, Group, Rollout, group_gradient, resolve

aten = torch.ops.aten
LAYERS, VOCABULARY = QWEN3["num_hidden_layers"], QWEN3["vocab_size"]


class Trace(TorchDispatchMode):
    """Follows the storages of fake tensors, the attention kernels and the logits.

    Token ids and masks stay real, because the sizes of what is indexed depend on them. What
    the program reads from a fake tensor is 1 or True.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes, self.kernels, self.logits, self.casts = {}, Counter(), set(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_of((args, kwargs))
        fake = any(isinstance(x, FakeTensor) for x in inputs)
        numbers = inputs or tensors_of(func(*args, **kwargs))
        if not fake and not any(x.is_floating_point() for x in numbers):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0 if inputs[0].is_floating_point() else True
        if func is aten.masked_select.default:
            out = args[0].new_empty(int(args[1].sum()))
        elif func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            with _disable_current_modes():
                places = args[1][0].nonzero().unbind(1)
            out = func(args[0], list(places))
        else:
            out = func(*args, **kwargs)
        for x in tensors_of(out):
            self.follow(x)
        self.peak = max(self.peak, self.live + inside(func, args))
        if func is aten._scaled_dot_product_flash_attention.default:
            self.note("flash", *args[:2])
        if func is aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.casts[len(args[0]), id(args[0])] += 1
        if func.overloadpacket is aten.mm and out.shape[-1] == VOCABULARY:
            self.logits.add((args[0].dtype, args[1].dtype, out.dtype))
        return out

    def follow(self, x):
        """Count the storage of x until it is freed."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.live -= self.sizes.pop(key)

    def note(self, kernel, query, key):
        """Count a kernel by its pass. In the prompt's pass the queries are all of the keys."""
        which = "training" if torch.is_grad_enabled() else "scoring"
        which = "prompt" if query.shape[2] == key.shape[2] else which
        self.kernels[which, query.shape[0], query.shape[2], kernel] += 1

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                  scale=None, enable_gqa=False):
        """F.scaled_dot_product_attention as on CUDA: autocast's casts, then a kernel. In torch
        2.13 flash takes no mask, and the memory-efficient kernel no grouped heads."""
        if isinstance(attn_mask, bias.CausalBias):
            return bias.CausalBias._dispatch(query, key, value, attn_mask, dropout_p, is_causal,
                                             scale, enable_gqa)
        if torch.is_autocast_enabled("cpu"):
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        with torch.autocast("cpu", enabled=False):
            if attn_mask is None and query.dtype == torch.bfloat16:
                return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal,
                                                                scale=scale)[0]
            self.note("math" if enable_gqa else "efficient", query, key)
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, 0.0, is_causal, None, scale=scale,
                enable_gqa=enable_gqa)[0]


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def inside(func, args):
    """The bytes that a kernel on CUDA holds beside its inputs and outputs."""
    if func is aten.logsumexp.default:  # exp(x - max x)
        return args[0].numel() * args[0].element_size()
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        (R, H, T, D), S = args[1].shape, args[2].shape[2]
        return 4 * R * H * T * (D + 1) + 2 * 2 * R * H * S * D  # dq; dk and dv of every head
    return 0


@pytest.fixture
def trace(monkeypatch):
    """A trace. From here on fake tensors take the path of a GPU."""
    def real(cls, *sizes):
        with _disable_current_modes():
            return torch.Tensor.__new__(cls)

    trace = Trace()
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", trace.attention)
    monkeypatch.setattr(bias.CausalBias, "__new__", real)
    monkeypatch.setattr(bias, "can_use_flash_attention", lambda x: x.query.dtype != torch.float32)
    monkeypatch.setattr(bias, "can_use_efficient_attention", lambda x: False)
    monkeypatch.setattr(bias, "_raise_kernel_warnings", lambda x: None)
    monkeypatch.setitem(tsallis_rl.CHUNK, "cpu", tsallis_rl.CHUNK["cuda"])
    return trace


@pytest.mark.parametrize("prompt, lengths, batches", [  # batches: (rows, tokens of a row)
    pytest.param(1000, [3968, 16], [(1, 3968), (1, 16)], id="a full FinQA response"),
    pytest.param(1024, [896] * 8, [(7, 896), (1, 896)], id="a full budget"),
    pytest.param(2300, [184] * 32, [(19, 184), (13, 184)], id="short responses, long prompt")])
def test_kernels_and_memory_on_a_gpu(prompt, lengths, batches, trace):
    """Flash attention in every layer of every pass, float32 logits of bfloat16 factors, one
    bfloat16 copy of each weight but the output layer's, and the README's rule for memory."""
    config = resolve(Config(method="garl", data="finqa", dtype="bfloat16", M=len(lengths)))
    # a rationale, two forced tokens, a gold answer of six
    rollouts = [Rollout([5] * (n - 8), [0.0] * (n - 8), [7, 8], [6] * 6) for n in lengths]
    group = Group(None, [5] * prompt, rollouts, torch.zeros(len(lengths)), 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Qwen3ForCausalLM(Qwen3Config(**QWEN3)).eval()
        model.set_attn_implementation("lower_right")
        for p in model.parameters():  # the step before has left gradients
            p.grad = torch.zeros_like(p)
            trace.follow(p)
            trace.follow(p.grad)
        with trace:
            group_gradient(model, group, config)

    passes = [(which, *batch) for which in ("scoring", "training") for batch in batches]
    passes += [("prompt", 1, prompt - 1)]
    assert trace.kernels == {(*at, "flash"): LAYERS for at in passes}
    assert trace.logits == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert {n for (rows, _), n in trace.casts.items() if rows != VOCABULARY} == {1}
    # bytes of a parameter: 4 weight, 4 gradient, 8 AdamW (not in the trace), 2 bfloat16 copy
    parameters, (rows, length) = model.num_parameters(), batches[0]
    tokens = prompt + rows * (length + math.ceil(prompt / 22))
    rule = 18 * parameters + 2e9 + 2.4e6 * tokens
    assert abs(trace.peak + 8 * parameters - rule) < 0.1 * rule
