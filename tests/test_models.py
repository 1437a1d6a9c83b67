"""Models and tokenizers of many kinds: each trains right, or is refused in one line."""
import json
from pathlib import Path

import conftest
import pytest
import torch
import transformers as hf
from conftest import CHAT, error, group_of, plain_gradient, plain_template, program, weights

import tsallis_rl
from data import Record
from data.files import UserError
from tsallis_rl import GAP_BOUND, HFRollouts, Template, encode, generate, group_gradient

CPU = torch.device("cpu")
SHAPE = conftest.SHAPE | dict(pad_token_id=None, bos_token_id=None, eos_token_id=486)
EXPERTS = SHAPE | dict(moe_intermediate_size=16, num_experts_per_tok=2)
OLD = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_heads=4)
MODELS = {  # name: (settings, the reason why it cannot be trained)
    "Qwen3": (SHAPE | dict(head_dim=16), None),
    "Llama": (SHAPE, None),
    "GPT2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.5), None),
    "Mistral": (SHAPE | dict(sliding_window=400, attention_dropout=0.5), None),
    "Gemma3Text": (SHAPE | dict(head_dim=16, sliding_window=512), None),
    "Phi3": (SHAPE, None),
    "Qwen3Moe": (EXPERTS | dict(head_dim=16, num_experts=8), None),
    "DeepseekV3": (EXPERTS | dict(
        num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=1), None),
    "Gemma2": (SHAPE | dict(head_dim=16), "softcap"),
    "Cohere": (SHAPE, "sampler and trainer differ"),
    "Falcon": (OLD, "cannot replace its attention"),
    "Mamba": (OLD, "cannot replace its attention"),
    "T5": (dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4), "T5Config"),
}


@pytest.fixture
def saved(tmp_path, lab):
    """saved(config): the folder of a random model."""
    def save(config):
        folder, seq2seq = tmp_path / "model", config.model_type == "t5"
        torch.manual_seed(0)
        kind = hf.AutoModelForSeq2SeqLM if seq2seq else hf.AutoModelForCausalLM
        kind.from_config(config).save_pretrained(folder)
        lab[1].tokenizer.save_pretrained(folder)
        return str(folder)
    return save


@pytest.mark.parametrize("name", MODELS)
def test_model(name, saved, lab, config):
    """A model's gradient is that of eager attention, or one line says what is the matter."""
    settings, reason = MODELS[name]
    path = saved(getattr(hf, f"{name}Config")(**settings | {"vocab_size": 489}))

    def train(dtype):
        model, template = tsallis_rl.load_model(path, CPU)
        chosen = config(method="garl", q=0.5, M=4, dtype=dtype)
        prompt = template.prompt("What is 2+3? Ann has 4 and gives 2.")
        engine = HFRollouts(model, template, chosen)
        rollouts = generate(engine, [prompt[3:], prompt], [7, 9], 4, 10, 0)
        group = group_of(template, prompt, rollouts[1])
        if not group_gradient(model, group, chosen)[1]["sampler_gap"] <= GAP_BOUND[dtype]:
            raise UserError("sampler and trainer differ")  # as in train_step
        eager = hf.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        return model, plain_gradient(eager.float().eval(), group, chosen)[1]

    if reason:
        with pytest.raises(UserError, match=reason):
            train("float32")
    else:
        assert error(*train("float32")) < 1e-5
        model, plain = train("bfloat16")  # experts that the prompt does not reach train, too
        assert error(model, plain) < 0.3
        assert all((p.grad.norm() > 0) == (g.norm() > 0) for p, g in zip(model.parameters(), plain))


def test_checkpoint(saved, small, tmp_path):
    """A checkpoint in bfloat16 is trained and saved in float32, or small updates are lost. It
    names all end tokens, and no temperature. Half a checkpoint is refused."""
    path, run = saved(hf.LlamaConfig(**SHAPE, vocab_size=489)), tmp_path / "run"
    hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    ends = Path(path, "generation_config.json")
    ends.write_text(json.dumps({"temperature": 0.1, "eos_token_id": [486, 7]}))
    template = tsallis_rl.load_model(path, CPU)[1]
    assert template.ends == {486, 7} <= template.stop and template.end == 486
    assert program([*small, "--model", path, "--steps", "1", "--out", str(run)]) == 0
    assert {w.dtype for w in weights(path, ".").values()} == {torch.bfloat16}
    assert {w.dtype for w in weights(run).values()} == {torch.float32}
    last = json.loads((run / "last" / ends.name).read_text())
    assert set(last["eos_token_id"]) == {486, 7} and "temperature" not in last
    hf.LlamaConfig(**SHAPE | {"num_hidden_layers": 3, "vocab_size": 489}).save_pretrained(path)
    with pytest.raises(UserError, match="missing: .*layers.2"):  # weights would be random
        tsallis_rl.load_model(path, CPU)


@pytest.mark.parametrize("changes, words", (
    (dict(sliding_window=400), None),
    (dict(sliding_window=20), "20 positions"),
    (dict(vocab_size=488), "tokens that the model lacks"),  # no </think>
    (dict(vocab_size=100, eos_token_id=5), "tokens that the model lacks")))
def test_limits_of_a_model(changes, words, saved, small, tmp_path, capsys):
    """A sliding window over the longest sequence is no obstacle; a shorter one, or tokens
    beyond the embeddings, are said in one line before the first step."""
    path = saved(hf.MistralConfig(**SHAPE | {"vocab_size": 489} | changes))
    run = ["--model", path, "--steps", "1", "--out", str(tmp_path / "run")]
    assert program([*small, *run]) == (2 if words else 0)
    error = capsys.readouterr().err
    assert not words or (words in error and error.count("\n") == 1)


def test_end_of_turn(lab):
    """The end token is what the chat template puts after an answer, or else eos."""
    tokenizer = plain_template().tokenizer
    turn = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    template = Template(tokenizer)
    assert template.end == turn != tokenizer.eos_token_id  # as Gemma and Phi do
    assert template.ends == {turn, tokenizer.eos_token_id} and template.gold("3")[-1] == turn
    assert template.text(template.gold("3")) == "3" == template.text(template.gold("3")[:-1])
    tokenizer.chat_template = CHAT.replace("<|im_end|>", " <|im_end|>")
    assert Template(tokenizer).end == turn
    for other in (CHAT.replace("<|im_end|>", " END"), None):  # no special token, no chat
        tokenizer.chat_template = other
        assert Template(tokenizer).end == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        Template(tokenizer)


@pytest.mark.parametrize("record, word", (
    (Record("bad", "Q", "Q", "4<|im_end|>2"), "<|im_end|>"),
    (Record("bad", "Q <|endoftext|>", "Q", "4"), "<|endoftext|>"),
    (Record("bad", "", "Q", "4"), "no warm_prompt")))
def test_refused_records(record, word, lab, config):
    """Control tokens in a record and an empty prompt of the kind asked for are refused."""
    with pytest.raises(UserError, match="record bad") as refused:
        encode([Record("0", "Q", "Q", "4"), record], config(), lab[1], lab[0], training=True)
    assert word in str(refused.value)
