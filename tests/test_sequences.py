"""Token sequences are joined by id: prompt | z | </think> | "\n\n" | answer | end token, with explicit masks."""
import re

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer

from data import Record
from data.files import UserError
from tsallis_rl import CLOSE, FORCED, SEAM, Format, Rollout, Y, Z, encode, load_model, respond

from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast  # after tsallis_rl: see its guard

CPU = torch.device("cpu")

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
    response = respond(Rollout(z, closed, [], [-1.0] * len(z)), y, fmt)
    assert response.ids == z + ([] if closed else list(fmt.close)) + list(fmt.seam) + y
    assert y[-1] == fmt.end == fmt.tokenizer.eos_token_id
    assert fmt.tokenizer.decode(response.ids).replace(" ", "").endswith(f"{CLOSE}{SEAM}5{fmt.tokenizer.eos_token}")
    of_kind = lambda kind: [i for i, k in enumerate(response.kinds) if k == kind]
    n = len(response.ids)
    assert len(response.kinds) == n and of_kind(Z) == list(range(len(z))) and of_kind(Y) == list(range(n - len(y), n))
    assert [response.ids[i] for i in of_kind(FORCED)] == fmt.forced(closed)  # a forced </think> is scored as neither


def test_a_rationale_is_never_decoded_and_encoded_again():
    fmt = plain_format()
    z = [i for text in "th in k".split() for i in fmt.tokenizer.encode(text, add_special_tokens=False)]
    assert fmt.tokenizer.encode(fmt.tokenizer.decode(z), add_special_tokens=False) != z  # a model may sample such ids
    response = respond(Rollout(z, False, [], [-1.0] * len(z)), fmt.gold("3"), fmt)
    assert response.ids[:len(z)] == z and response.kinds.count(Z) == len(z)


def test_the_end_token_is_scored_although_it_is_also_the_padding_token():
    fmt = plain_format()
    assert fmt.tokenizer.pad_token_id == fmt.end
    response = respond(Rollout([5], False, [], [-1.0]), fmt.gold("38"), fmt)
    assert response.kinds[-1] == Y and response.ids[-1] == fmt.end


def test_a_rationale_is_closed_by_the_token_that_completes_the_delimiter(fmt):
    ids = fmt.tokenizer.encode("2+3=5", add_special_tokens=False) + list(fmt.close)
    assert fmt.closed(ids)
    assert not any(fmt.closed(ids[:n]) for n in range(1, len(ids)))


def test_the_prompt_ends_where_the_model_begins_to_think(fmt):
    text = fmt.tokenizer.decode(fmt.prompt("What is 2+3?"))
    assert text.count("<|im_start|>") == 2 and text.endswith("<|im_start|>assistant\n")


def test_prompts_over_the_limit_are_dropped_whole_and_one_of_exactly_the_limit_stays(lab, config, capsys):
    fmt = lab[1]
    records = [Record(str(i), "item " * n, "item", "5") for i, n in enumerate((1, 30, 2))]
    lengths = [len(fmt.prompt(r.warm_prompt)) for r in records]
    assert lengths[0] < lengths[2] < lengths[1]
    for limit, kept in ((lengths[2], "02"), (lengths[2] - 1, "0"), (lengths[0], "0"), (lengths[1], "012"), (lengths[1] - 1, "02")):
        examples = encode(records, config(prompt_limit=limit), fmt, 1024)
        assert [record for record, _ in examples] == records, "a dropped prompt keeps its place"
        assert "".join(record.id for record, ids in examples if ids) == kept
        assert all(ids in ([], fmt.prompt(record.warm_prompt)) for record, ids in examples), "whole or not at all"
        assert f"{len(kept)} of 3 prompts have at most {limit} tokens" in capsys.readouterr().out
    assert all(ids for _, ids in encode(records, config(prompt_limit=lengths[2], start="cold"), fmt, 1024))
    with pytest.raises(UserError, match="every prompt is longer than 3 tokens"):
        encode(records, config(prompt_limit=3), fmt, 1024)


def test_a_prompt_must_leave_room_for_rationale_answer_and_gold_in_the_model_s_positions(lab, config, capsys):
    fmt, long = lab[1], "123456789012345"
    records = [Record(str(i), "item " * n, "", gold) for i, (n, gold) in enumerate(((1, "5"), (30, "5")))]
    lengths = [len(fmt.prompt(r.warm_prompt)) for r in records]
    settings = config(think_budget=24, answer_budget=8)
    exact = lengths[1] + 24 + len(fmt.close + fmt.seam) + 8
    for positions, kept in ((exact, 2), (exact - 1, 1)):
        assert sum(bool(ids) for _, ids in encode(records, settings, fmt, positions)) == kept
    capsys.readouterr()
    records[0] = Record("0", "item", "", long)  # longer than an answer may be: it needs more room
    more = len(fmt.gold(long)) - 8
    assert more > 0
    for positions, kept in ((exact + more, 2), (exact + more - 1, 1)):
        assert sum(bool(ids) for _, ids in encode(records, settings, fmt, positions)) == kept
        assert re.search("; 1 .*--answer-budget", capsys.readouterr().out)
    with pytest.raises(UserError, match="every prompt is longer than -?[0-9]+ tokens.* lower --think-budget"):
        encode(records, settings, fmt, 40)


def test_a_tokenizer_that_makes_nothing_of_a_prompt_is_not_called_a_long_prompt(lab, config):
    fmt, broken = lab[1], lab[1].__class__(lab[1].tokenizer, lab[1].close, lab[1].seam, lab[1].end)
    object.__setattr__(broken, "prompt", lambda text: [])
    with pytest.raises(UserError, match="^the tokenizer makes less than two tokens of a prompt"):
        encode([Record("0", "item", "item", "5")], config(), broken, 1024)


def test_an_answer_s_text_loses_its_end_and_no_other_special_token(fmt):
    ids = [i for text in "42" for i in fmt.tokenizer.encode(text, add_special_tokens=False)]
    other = fmt.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert other != fmt.end
    assert fmt.text(ids) == fmt.text([*ids, fmt.end]) == "42"
    for place in range(3):
        for special in (other, fmt.end):
            text = fmt.text([*ids[:place], special, *ids[place:], fmt.end])
            assert text != "42" and fmt.tokenizer.decode([special]) in text, "the special token may not vanish"


def test_a_tokenizer_without_an_end_token_is_refused():
    fmt = plain_format()
    fmt.tokenizer.eos_token = None
    with pytest.raises(UserError, match="end token"):
        Format.of(fmt.tokenizer)


def test_a_chat_template_that_drops_the_user_s_turn_is_refused():
    fmt = plain_format()
    fmt.tokenizer.chat_template = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(UserError, match="drops the user's text"):
        Format.of(fmt.tokenizer)


def test_a_model_with_sliding_windows_is_refused(tmp_path, lab):
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    for window in (None, 8):
        model = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=window, **shape))
        model.save_pretrained(tmp_path)
        lab[1].tokenizer.save_pretrained(tmp_path)
        if window is None:
            load_model(str(tmp_path), CPU)
    with pytest.raises(UserError, match="sliding-window"):
        load_model(str(tmp_path), CPU)
