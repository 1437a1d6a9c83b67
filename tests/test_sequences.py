"""Token sequences are joined by id: prompt | z | </think> | "\n\n" | answer | end token, with explicit masks."""
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from data import Record
from tsallis_rl import CLOSE, SEAM, Format, Response, Rollout, RunError, encode, load_model

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def plain_format():
    """A byte-level BPE tokenizer, as SmolLM2 and Llama have, that merges across seams and knows no </think> token."""
    bpe = ByteLevelBPETokenizer()
    text = ["I think so.\n\n42 is 12% of 350.</think>\n\n12%", "</think> so think .\n\n yes </b> no", "the answer is 3\n\n38"] * 50
    bpe.train_from_iterator(text, vocab_size=400, min_frequency=1, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return Format.of(tokenizer)


@pytest.fixture(params=["think token", "ordinary tokens"])
def fmt(request, lab):
    return lab[1] if request.param == "think token" else plain_format()


def test_the_two_tokenizers_are_of_the_two_kinds(lab):
    assert len(lab[1].close) == 1 and len(plain_format().close) > 1


@pytest.mark.parametrize("closed", (True, False))
def test_a_response_is_the_sampled_ids_then_the_forced_ones_then_the_answer_through_its_end_token(fmt, closed):
    z = fmt.tokenizer.encode("2+3=5", add_special_tokens=False) + list(fmt.close) * closed
    y = fmt.gold("5")
    response = Response.of(Rollout(z, closed, [], [-1.0] * len(z)), y, fmt)
    assert response.ids == z + ([] if closed else list(fmt.close)) + list(fmt.seam) + y
    assert y[-1] == fmt.end == fmt.tokenizer.eos_token_id
    assert fmt.tokenizer.decode(response.ids).replace(" ", "").endswith(f"{CLOSE}{SEAM}5{fmt.tokenizer.eos_token}")
    n = len(response.ids)
    assert [i for i in range(n) if response.z_mask[i]] == list(range(len(z)))
    assert [i for i in range(n) if response.y_mask[i]] == list(range(n - len(y), n))
    forced = [i for i in range(n) if not response.z_mask[i] and not response.y_mask[i]]
    assert [response.ids[i] for i in forced] == fmt.forced(closed)  # a forced </think> is in neither mask


def test_a_rationale_is_never_decoded_and_encoded_again():
    fmt = plain_format()
    z = [i for text in "th in k".split() for i in fmt.tokenizer.encode(text, add_special_tokens=False)]
    assert fmt.tokenizer.encode(fmt.tokenizer.decode(z), add_special_tokens=False) != z  # a model may sample such ids
    response = Response.of(Rollout(z, False, [], [-1.0] * len(z)), fmt.gold("3"), fmt)
    assert response.ids[:len(z)] == z and sum(response.z_mask) == len(z)


def test_the_end_token_is_scored_although_it_is_also_the_padding_token():
    fmt = plain_format()
    assert fmt.tokenizer.pad_token_id == fmt.end
    response = Response.of(Rollout([5], False, [], [-1.0]), fmt.gold("38"), fmt)
    assert response.y_mask[-1] and response.ids[-1] == fmt.end


def test_a_rationale_is_closed_by_the_token_that_completes_the_delimiter(fmt):
    ids = fmt.tokenizer.encode("2+3=5", add_special_tokens=False) + list(fmt.close)
    assert fmt.closed(ids)
    assert not any(fmt.closed(ids[:n]) for n in range(1, len(ids)))


def test_the_prompt_ends_where_the_model_begins_to_think(fmt):
    text = fmt.tokenizer.decode(fmt.prompt("What is 2+3?"))
    assert text.count("<|im_start|>") == 2 and text.endswith("<|im_start|>assistant\n")


def test_prompts_over_the_limit_are_dropped_whole_and_a_limit_that_drops_all_is_an_error(lab):
    records = [Record(str(i), "item " * n, "item", "5") for i, n in enumerate((1, 30, 2))]
    kept = encode(records, "warm", lab[1], 25)
    assert [r.id for r in kept.records] == ["0", "2"] and len(kept.ids) == 2
    assert len(encode(records, "cold", lab[1], 25).ids) == 3
    with pytest.raises(RunError, match="every prompt is longer than --prompt-limit 3"):
        encode(records, "warm", lab[1], 3)


def test_a_tokenizer_without_an_end_token_is_refused():
    fmt = plain_format()
    fmt.tokenizer.eos_token = None
    with pytest.raises(RunError, match="end token"):
        Format.of(fmt.tokenizer)


def test_a_model_with_sliding_windows_is_refused(tmp_path, lab):
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    for window in (None, 8):
        model = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=window, **shape))
        model.save_pretrained(tmp_path)
        lab[1].tokenizer.save_pretrained(tmp_path)
        if window is None:
            load_model(str(tmp_path))
    with pytest.raises(RunError, match="sliding-window"):
        load_model(str(tmp_path))
