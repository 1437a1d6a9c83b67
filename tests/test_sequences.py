"""Sequences are joined as token ids: prompt | z | </think> | "\n\n" | answer | end token."""
import pytest
from conftest import plain_template
from tokenizers.normalizers import NFKC
from data import Record
from data.files import UserError
from tsallis_rl import Rollout, encode, positions


@pytest.fixture(params=["think token", "ordinary tokens"])
def template(request, lab):
    """One whose </think> is a token, and one whose </think> is several."""
    found = lab[1] if request.param == "think token" else plain_template()
    assert (len(found.close) == 1) == (request.param == "think token")
    return found


@pytest.mark.parametrize("closed", (True, False))
def test_response(closed, template):
    """A response is the sampled ids, what is forced, and the answer through its end token.
    A forced </think> has no loss, a sampled one has."""
    z = template.encode("2+3=5") + template.close * closed
    response = Rollout(z, [-1.0] * len(z), template.forced(z), template.gold("5"))
    forced = template.separator if closed else template.close + template.separator
    assert response.ids == z + forced + template.encode("5") + [template.end]


def test_prompt(template):
    """A prompt ends where the model begins to think; without a chat template it is as it is."""
    text = template.tokenizer.decode(template.prompt("What is 2+3?"))
    assert text.count("<|im_start|>") == 2 and text.endswith("<|im_start|>assistant\n")
    bare = plain_template()
    bare.tokenizer.chat_template = None
    assert bare.prompt("think so") == bare.encode("think so")


def test_text(template):
    """The text of an answer lacks its end token, and no other special token."""
    ids = [i for text in "42" for i in template.encode(text)]
    other = template.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert template.text(ids) == template.text([*ids, template.end]) == "42"
    for place in range(3):
        for special in (other, template.end):
            text = template.text([*ids[:place], special, *ids[place:], template.end])
            assert text != "42" and template.tokenizer.decode([special]) in text


def test_stop(lab):
    """A </think> of one token ends a rationale; one of several ends none."""
    assert lab[1].stop == {lab[1].end, lab[1].close[0]}
    assert plain_template().stop == plain_template().ends


def test_prompt_limit(lab, config):
    """A prompt over the limit is dropped whole, keeps its place, and one of the limit stays."""
    records = [Record(str(i), "item " * n, "item", "5") for i, n in enumerate((1, 30, 2))]
    short, long, middle = prompts = [lab[1].prompt(record.warm_prompt) for record in records]
    fitting = lambda **settings: encode(records, config(**settings), lab[1], lab[0], True)
    for limit, kept in ((len(middle), [short, [], middle]), (len(middle) - 1, [short, [], []]),
                        (len(long), prompts), (len(long) - 1, [short, [], middle])):
        assert fitting(prompt_limit=limit) == list(zip(records, kept))
    cold = fitting(prompt_limit=len(middle), start="cold")
    assert [ids for _, ids in cold] == [lab[1].prompt("item")] * 3
    with pytest.raises(UserError, match="3 tokens"):
        fitting(prompt_limit=3)


def test_changed_golds(lab, config, capsys):
    """Golds that do not come back from their own tokens are counted."""
    template = plain_template()
    template.tokenizer.backend_tokenizer.normalizer = NFKC()  # "½" becomes "1⁄2"
    encode([Record("0", "Q", "Q", gold) for gold in "½2"], config(), template, lab[0], True)
    assert "1 gold answers change" in capsys.readouterr().out


def test_room(lab, config):
    """Prompt, rationale, forced tokens and answer must fit into the model's positions; the
    gold answer counts where it is scored and is longer than a sampled one."""
    room = positions(lab[0]) - len(lab[1].prompt("")) - len(lab[1].forced([]))
    fits = lambda record, think, training: bool(encode(
        [record, Record("1", "Q", "Q", "5")], config(think_budget=think, answer_budget=8),
        lab[1], lab[0], training)[0][1])
    long = "1234567890123456789"
    gold = len(lab[1].gold(long))
    assert gold > 8
    for answer, training, size in (("5", True, 8), (long, True, gold), (long, False, 8)):
        record = Record("0", "Q Q Q", "Q", answer)
        think = room - len(lab[1].encode("Q Q Q")) - size
        assert fits(record, think, training) and not fits(record, think + 1, training)
