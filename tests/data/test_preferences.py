"""Preferences: every form of a row, what is refused or held out, and how a model reads them."""

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

from llmctl.config.finetuning import Preferred
from llmctl.data.audit.rules import RowRules
from llmctl.data.bad_rows import BadRows
from llmctl.data.builtin import named_preferences, tasks
from llmctl.data.chat.responses import ResponseFormat, prepare_template
from llmctl.data.preference_pairs import encode_pairs
from llmctl.data.preferences import count_shared_lines, read_preferences
from llmctl.data.sources import find_sources
from llmctl.errors import DataError, UserError
from tests.run_files import write_rows

ASKED = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
KIND = {"role": "assistant", "content": "Hello."}
CURT = {"role": "assistant", "content": "What?"}
PAIR = {"chosen": "Hello.", "rejected": "What?"}


def preferences(seed):
    return named_preferences(f"builtin:preferences:{seed}")


def read(*data, **how):
    return read_preferences(Preferred(**{"val_size": 0, **how}), [str(name) for name in data], 0)


def only(tmp_path, row, **how):
    (pair,) = read(write_rows(tmp_path / "a.jsonl", [row]), **how).train
    return pair


FORMS = [
    ({"prompt": "Hi", **PAIR}, (ASKED,)),
    ({"prompt": "Hi", **PAIR, "margin": 1.5, "annotator": "a"}, (ASKED,)),
    ({"prompt": [SYSTEM, ASKED], **PAIR}, (SYSTEM, ASKED)),
    ({"prompt": "Hi", **PAIR, "system": "Be kind."}, (SYSTEM, ASKED)),
    ({"prompt": [ASKED], "chosen": [KIND], "rejected": [CURT]}, (ASKED,)),
    ({"prompt": "Hi", "chosen": [ASKED, KIND], "rejected": [ASKED, CURT]}, (ASKED,)),
    ({"chosen": [ASKED, KIND], "rejected": [ASKED, CURT]}, (ASKED,)),
    (
        {"chosen": [ASKED, KIND, ASKED, KIND], "rejected": [ASKED, KIND, ASKED, CURT]},
        (ASKED, KIND, ASKED),
    ),
    ({"instruction": "Hi", "input": "", "output": "Hey.", **PAIR}, (ASKED,)),
    (
        {"instruction": "Answer.", "input": "Hi", "output": "Hey.", **PAIR},
        ({"role": "user", "content": "Answer.\n\nHi"},),
    ),
    ({"question": "Hi", **PAIR}, (ASKED,)),
    (
        {
            "input": {"messages": [SYSTEM, ASKED], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [KIND],
            "non_preferred_output": [CURT],
        },
        (SYSTEM, ASKED),
    ),
    (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
        },
        (ASKED,),
    ),
    ({"prompt": "Hi", "responses": ["What?", "Hello."], "ranks": [2, 1]}, (ASKED,)),
    (
        {"messages": [ASKED, KIND], "chosen": [ASKED, KIND], "rejected": [ASKED, CURT]},
        (ASKED,),
    ),
    (
        {
            "messages": [SYSTEM, ASKED, CURT],
            "chosen": [SYSTEM, ASKED, CURT, ASKED, KIND],
            "rejected": [SYSTEM, ASKED, CURT, ASKED, CURT],
        },
        (SYSTEM, ASKED, CURT, ASKED),
    ),
    (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
            "chosen": [ASKED, KIND],
            "rejected": [ASKED, CURT],
        },
        (ASKED,),
    ),
]


@pytest.mark.parametrize(("row", "prompt"), FORMS, ids=range(len(FORMS)))
def test_every_form_becomes_a_prompt_and_two_answers(tmp_path, row, prompt):
    pair = only(tmp_path, row)
    assert pair.prompt == prompt
    assert pair.chosen.messages[pair.shared :] == (KIND,)
    assert pair.rejected.messages[pair.shared :] == (CURT,)
    assert (pair.weight, pair.margin) == (1, row.get("margin"))
    assert pair.name.endswith("a.jsonl:1")


def test_texts_without_a_prompt_stay_texts(tmp_path):
    pair = only(tmp_path, {"chosen": "A good story.", "rejected": "A bad one."})
    assert (pair.chosen.text, pair.rejected.text, pair.shared) == ("A good story.", "A bad one.", 0)


def test_columns_can_be_told(tmp_path):
    row = {"q": "Hi", "yes": "Hello.", "no": "What?", "by": 2}
    columns = ["prompt=q,chosen=yes", "rejected=no,margin=by"]
    pair = only(tmp_path, row, columns=columns)
    assert (pair.prompt, pair.margin) == ((ASKED,), 2)
    pair = only(tmp_path, row, columns=["chosen=yes,rejected=no"])
    assert pair.chosen.text == "Hello."
    row = {"q": "Hi", "all": ["What?", "Hello."], "places": [2, 1]}
    pair = only(tmp_path, row, columns=["prompt=q,responses=all,ranks=places"])
    assert pair.chosen.messages == (ASKED, KIND)
    with pytest.raises(UserError, match="no role `label` of preferences"):
        read("none", columns=["label=x"])


def test_a_ranking_becomes_all_pairs_that_weigh_one(tmp_path):
    """By definition: ranks 1 2 2 3 make 5 pairs of different rank, each of weight 1/5."""
    row = {"prompt": "Hi", "responses": ["b", "a", "c", "d"], "ranks": [2, 1, 2, 3]}
    found = read(write_rows(tmp_path / "a.jsonl", [row])).train
    told = {(p.chosen.messages[1]["content"], p.rejected.messages[1]["content"]) for p in found}
    assert told == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert len(found) == 5
    assert [pair.weight for pair in found] == [0.2] * 5


def test_rows_without_a_verdict_are_left_out_and_counted(tmp_path):
    ranked = {"prompt": "Hi", "responses": ["a", "b"], "annotator": "x", "time": 3}
    rows = [
        {**ranked, "ranks": [1, 1]},
        {**ranked, "ranks": [None, None]},
        {**ranked, "ranks": [1, None]},
        {**ranked, "ranks": None},
        {**ranked, "responses": ["a", "a"], "ranks": [1, 2]},
        {**ranked, "ranks": [1, 2]},
        {**ranked, "responses": ["a", "b", "b"], "ranks": [1, 2, 3]},
    ]
    found = read(write_rows(tmp_path / "a.jsonl", rows))
    assert found.dropped == {"equal": 1, "undecided": 4}
    assert [pair.weight for pair in found.train] == [1, 0.5, 0.5]
    same = write_rows(tmp_path / "b.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "a"}])
    assert read(tmp_path / "a.jsonl", same).dropped["equal"] == 2
    with pytest.raises(DataError, match="no preference to learn from: 1 row has equal"):
        read(same)


REFUSED = [
    ({"prompt": "Hi", "chosen": "a"}, "no example in these columns: `prompt`, `chosen`"),
    ({"prompt": "Hi", "rejected": "a"}, "no example in these columns: `prompt`, `rejected`"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "`rejected` is null, expected text"),
    ({"prompt": "Hi", "chosen": "", "rejected": "a"}, "`chosen` is empty"),
    ({"prompt": "", **PAIR}, "`prompt` is empty"),
    ({"prompt": " \n", **PAIR}, "`prompt` is nothing but white space"),
    ({"prompt": [], **PAIR}, "begins with the assistant"),
    ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1]}, "2 responses, but 1 rank"),
    ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, "2"]}, r"`ranks\[1\]` is '2'"),
    ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, 1]}, r"`ranks\[0\]` is 0"),
    ({"prompt": "Hi", "responses": ["a", 3], "ranks": [1, 2]}, r"`responses\[1\]` is a number"),
    ({"prompt": "Hi", "responses": "a", "ranks": [1, 2]}, "`responses` is text, expected a list"),
    ({"prompt": "Hi", **PAIR, "margin": -1}, "`margin` is -1: the chosen response would be"),
    ({"prompt": "Hi", **PAIR, "margin": "big"}, "`margin` is 'big', expected a number"),
    ({"prompt": "Hi", **PAIR, "margin": 10**400}, r"`margin` is 10{39}, expected a number of at"),
    ({"prompt": "Hi", **PAIR, "margin": -(10**400)}, "`margin` is -10{38}: the chosen"),
    (
        {"prompt": "Hi", **PAIR, "margin": 1e39},
        r"`margin` is 1e\+39, expected a number of at most 3",
    ),
    ({"chosen": [ASKED, KIND], "rejected": [SYSTEM, ASKED, CURT]}, "answer different prompts"),
    ({"chosen": [ASKED, KIND], "rejected": "What?"}, "one response is a conversation"),
    ({"prompt": "Bye", "chosen": [ASKED, KIND], "rejected": [ASKED, CURT]}, "`prompt` is not in"),
    ({"chosen": [ASKED, KIND, ASKED], "rejected": [ASKED, CURT]}, "ends with the user"),
    (
        {"prompt": [ASKED, CURT], "chosen": [ASKED, KIND], "rejected": [ASKED, CURT]},
        "`chosen` is a whole conversation, and `prompt` is not in it",
    ),
    ({"prompt": [SYSTEM, ASKED], **PAIR, "system": "No."}, "beside a message of the system"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_preference_is_refused_with_its_line(tmp_path, row, message):
    fine = {"prompt": "Hi", **PAIR}
    if "prompt" not in row:
        fine = {"chosen": [ASKED, KIND], "rejected": [ASKED, CURT]}
    if "ranks" in row:
        fine = {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]}
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert (caught.value.file, caught.value.line, caught.value.code) == (str(path), 1, 3)
    path = write_rows(tmp_path / "b.jsonl", [fine, row])
    assert len(read(path, skip_bad_rows=1).train) == 1


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "Hi", **PAIR}, {"prompt": "Hi", "chosen": "a"}]
    )
    with pytest.raises(DataError, match="no column `rejected`; there is `prompt`, `chosen`") as e:
        read(path)
    assert e.value.line == 2
    assert "--columns prompt=NAME,chosen=NAME,rejected=NAME" in e.value.hint


def many(count):
    draw = random.Random(0)
    return [
        {"prompt": f"What is {n // 3}?", "chosen": f"It is {draw.random()}.", "rejected": str(n)}
        for n in range(count)
    ]


def test_no_prompt_is_on_both_sides_and_the_split_is_that_of_the_prompts(tmp_path):
    rows = many(300)
    found = read(write_rows(tmp_path / "a.jsonl", rows), val_size=60)
    sides = [{pair.prompt[0]["content"] for pair in part} for part in (found.train, found.val)]
    assert not sides[0] & sides[1]
    assert 57 <= len(found.val) <= 60
    assert len(found.train) + len(found.val) == 300
    random.Random(3).shuffle(rows)
    again = read(write_rows(tmp_path / "b.jsonl", rows), val_size=60)
    assert {pair.prompt[0]["content"] for pair in again.val} == sides[1]
    assert found.statistics()["shared_prompts"] == 0


def test_weights_mix_and_pairs_of_a_prompt_go_together(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", many(90))
    other = write_rows(
        tmp_path / "b.jsonl", [{**r, "prompt": f"Say {r['prompt']}"} for r in many(90)]
    )
    found = read(f"{one}=0.25", f"{other}=0.75").train
    names = [pair.name.split(":")[0] for pair in found]
    assert (names.count(str(one)), names.count(str(other))) == (30, 90)


def test_a_pair_that_also_validates_is_refused(tmp_path):
    rows = many(30)
    path = write_rows(tmp_path / "a.jsonl", rows)
    val = write_rows(tmp_path / "v.jsonl", [rows[7]])
    with pytest.raises(DataError, match="this pair also validates") as caught:
        read(path, val_size=None, val_data=[str(val)])
    assert caught.value.line == 8
    val = write_rows(tmp_path / "v.jsonl", [{**rows[7], "chosen": "Other."}])
    assert read(path, val_size=None, val_data=[str(val)]).statistics()["shared_prompts"] == 1


def test_contradictions_are_counted(tmp_path):
    swapped = {"prompt": "Hi", "chosen": "What?", "rejected": "Hello."}
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "Hi", **PAIR}, swapped, {"prompt": "Hi", **PAIR}]
    )
    facts = read(path).statistics()
    assert (facts["contradictions"], facts["duplicates"]) == (1, 1)


def test_built_in_preferences_are_courteous_and_no_longer():
    found = preferences(3)
    assert found == preferences(3)
    assert [row["prompt"] for row in found] == [task.prompt for task in tasks(3)]
    assert not {row["prompt"] for row in found} & {row["prompt"] for row in preferences(4)}
    for row, task in zip(found, tasks(3), strict=True):
        assert task.answer in row["chosen"]
        assert task.answer in row["rejected"]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in found)
    assert 0.45 < longer / len(found) < 0.55
    assert len(read("builtin:preferences:3").train) == 2000
    with pytest.raises(DataError, match="no built-in data `builtin:preferences:16`") as caught:
        read("builtin:preferences:16")
    assert "builtin:preferences:SEED" in caught.value.hint


def test_built_in_preferences_are_no_text_to_pretrain_on(tmp_path):
    from llmctl.data.documents import read_pieces

    (source,) = find_sources(["builtin:preferences"], tmp_path)
    with pytest.raises(DataError, match="no column `text`; there is `prompt`, `chosen`"):
        next(read_pieces(source, "text"))


# --- as tokens

WORDS = ["Hi", "Hello", "What", "?", ".", "there", "user", "assistant", "<unk>"]


def tokenizer(kind):
    """Whole words: BERT's way or LLaMA's."""
    specials = ["[PAD]", "[CLS]", "[SEP]"] if kind == "bert" else ["[PAD]", "<s>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    if kind != "bert":
        single, pair = "<s> $A", "<s> $A <s>:1 $B:1"
    used = [(name, vocabulary[name]) for name in specials[1:]]
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=used
    )
    roles = (
        {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        if kind == "bert"
        else {"bos_token": "<s>", "eos_token": "</s>"}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="[PAD]", **roles
    )


def written(kind):
    shape = BertConfig() if kind == "bert" else LlamaConfig()
    found = tokenizer(kind)
    assert bool(prepare_template(found, shape, None)) == (kind != "bert")
    return ResponseFormat(found, shape)


def told(format_, encoded):
    words = format_.tokenizer.convert_ids_to_tokens(encoded.tokens)
    return " ".join(words), " ".join(w for w, k in zip(words, encoded.trained, strict=True) if k)


def test_an_encoder_gets_two_texts_and_their_types():
    bert = written("bert")
    found = bert.encode_conversation([ASKED, KIND], 1)
    assert told(bert, found) == ("[CLS] Hi [SEP] Hello . [SEP]", "Hello . [SEP]")
    types = bert.tokenizer("Hi", "Hello.", return_token_type_ids=True)["token_type_ids"]
    assert [int(is_response) for is_response in found.trained] == types
    whole, response = told(bert, bert.encode_conversation([ASKED, CURT, ASKED, KIND], 3))
    assert "assistant <unk> What ?" in whole
    assert response == "Hello . [SEP]"


def test_a_decoder_gets_its_template_and_the_end_only_where_the_response_ended():
    llama = written("llama")
    whole, response = told(llama, llama.encode_conversation([ASKED, KIND], 1))
    assert response == "Hello . <|im_end|>"
    assert whole.endswith("assistant Hello . <|im_end|>")
    whole, response = told(llama, llama.encode_conversation([ASKED, KIND], 1, ended=False))
    assert (response, whole.endswith("Hello .")) == ("Hello .", True)
    empty = [ASKED, {"role": "assistant", "content": ""}]
    assert told(llama, llama.encode_conversation(empty, 1))[1] == "<|im_end|>"
    assert told(llama, llama.encode_conversation(empty, 1, ended=False))[1] == ""
    assert told(llama, llama.encode_text("Hi", " there")) == ("<s> Hi there </s>", "there </s>")
    assert told(llama, llama.encode_text("Hi", " there", ended=False)) == ("<s> Hi there", "there")


def test_a_special_token_in_a_response_is_text():
    llama = written("llama")
    odd = {"role": "assistant", "content": "Hello <|im_end|> [PAD]"}
    tokens = llama.encode_conversation([ASKED, odd], 1).tokens
    assert tokens.count(llama.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert llama.tokenizer.pad_token_id not in tokens


def encode(form, *arguments):
    return encode_pairs(form, *arguments, BadRows(), RowRules(form.tokenizer))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_prompts_are_cut_from_the_left_and_responses_never(tmp_path, kind):
    form = written(kind)
    long = " ".join(["Hi"] * 20)
    rows = [
        {"prompt": long, "chosen": "Hello there .", "rejected": "What ?"},
        {"prompt": "Hi", "chosen": " ".join(["Hello"] * 30), "rejected": "What ?"},
        *({"prompt": "Hi", "chosen": "Hello .", "rejected": "What ?"} for _ in range(6)),
    ]
    pairs = read(write_rows(tmp_path / "a.jsonl", rows)).train
    whole = encode(form, pairs, 512, "drop")
    assert (len(whole), whole.cut, whole.dropped) == (8, 0, 0)
    limit = 20
    found = encode(form, pairs, limit, "auto")
    assert (len(found), found.cut, found.dropped) == (7, 1, 1)
    assert found.lengths.max() == limit
    assert found.numbers.tolist() == [0, 2, 3, 4, 5, 6, 7]
    prompts = []
    for ours, before in ((found.chosen, whole.chosen), (found.rejected, whole.rejected)):
        (tokens, trained), (all_tokens, all_trained) = ours.sequence(0), before.sequence(0)
        assert tokens[trained].tolist() == all_tokens[all_trained].tolist()
        prompt = tokens[~trained].tolist()
        assert prompt[0] == all_tokens[0]
        assert prompt[1:] == all_tokens[~all_trained].tolist()[-len(prompt) + 1 :]
        prompts.append(prompt)
    assert prompts[0] == prompts[1]
    assert encode(form, pairs, limit, "drop").dropped == 2
    with pytest.raises(DataError, match="every pair has more than 20 tokens"):
        encode(form, [pairs[1], pairs[1]], limit, "auto")
    with pytest.raises(DataError, match="1 of 2 pairs have responses that do not fit"):
        encode(form, pairs[:2], limit, "auto")
    assert len(encode(form, pairs[:2], limit, "cut")) == 1


def test_the_prompt_of_texts_is_what_they_begin_with(tmp_path):
    """Texts in a form of their own: whole prompts are held out, though no column names them."""
    rows = [
        {
            "chosen": f"### Instruction: Add {prompt}\n### Response: It is {answer}.",
            "rejected": f"### Instruction: Add {prompt}\n### Response: It is no {answer}.",
        }
        for prompt in range(10)
        for answer in range(3)
    ]
    assert_prompts_are_apart(write_rows(tmp_path / "a.jsonl", rows), "\n")


def assert_prompts_are_apart(file, end):
    """Of ten prompts, which stand before this text, none is on both sides of the split."""
    found = read(file, val_size=6)
    assert len(found.val) == 6
    statistics = found.statistics()
    assert (statistics["prompts"], statistics["shared_prompts"]) == (10, 0)
    trained = {pair.chosen.text.partition(end)[0] for pair in found.train}
    assert not trained & {pair.chosen.text.partition(end)[0] for pair in found.val}


FORMS_OF_TEXT = {
    "alpaca": "Below is a task.\n\n### Instruction:\nAdd {}\n\n### Response:\n",
    "alpaca in a line": "### Instruction: Add {}\n### Response: ",
    "guanaco": "### Human: Add {}\n### Assistant: ",
    "vicuna": "A chat.\n\nUSER: Hi ASSISTANT: Ho</s>USER: Add {} ASSISTANT: ",
    "llama-2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd {} [/INST] ",
    "zephyr": "<|user|>\nAdd {}</s>\n<|assistant|>\n",
    "chatml": "<|im_start|>user\nAdd {}<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\nAdd {}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nAdd {}<end_of_turn>\n<start_of_turn>model\n",
    "lines": "Human: Add {}\nAssistant: ",
}


@pytest.mark.parametrize("form", FORMS_OF_TEXT.values(), ids=FORMS_OF_TEXT)
def test_the_prompt_of_a_known_form_ends_where_the_response_begins(tmp_path, form):
    """Also where both responses begin with the same line, which is not of the prompt."""
    rows = [
        {
            "chosen": f"{form.format(prompt)}Well {answer}.\nIt is {answer}.",
            "rejected": f"{form.format(prompt)}Well {answer}.\nIt is no {answer}.",
        }
        for prompt in range(10)
        for answer in range(3)
    ]
    assert_prompts_are_apart(write_rows(tmp_path / "a.jsonl", rows), "Well")


def test_the_prompt_of_a_line_is_the_words_that_both_texts_begin_with(tmp_path):
    rows = [
        {"chosen": f"Q{prompt}? -> good {answer}", "rejected": f"Q{prompt}? -> bad {answer}"}
        for prompt in range(10)
        for answer in range(3)
    ]
    found = read(write_rows(tmp_path / "a.jsonl", rows), val_size=6)
    statistics = found.statistics()
    assert (len(found.val), statistics["prompts"], statistics["shared_prompts"]) == (6, 10, 0)
    stories = [
        {"chosen": f"Once upon a time {n} cats sat.", "rejected": f"Once upon {n} dogs ran far."}
        for n in range(30)
    ]
    found = read(write_rows(tmp_path / "b.jsonl", stories), val_size=6)
    assert found.statistics()["prompts"] == 30, "a beginning by chance is no prompt"


def texts(first, second, *, preamble=""):
    """Pairs that begin with a first and a second line, and end with yes or no."""
    return [
        {"chosen": f"{preamble}{a}\n{b}\nyes", "rejected": f"{preamble}{a}\n{b}\nno"}
        for a in first
        for b in second
    ]


ASKS = [f"What is {n}?" for n in range(10)]
SAYS = [f"It is so, {n} times." for n in range(3)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (texts(ASKS, SAYS), 6),
        (texts(ASKS, SAYS, preamble="Be kind.\nBe brief.\n"), 6),
        (texts(["Sum up:"], map(str, range(30))), 0),
        (texts(["Sum up:", "Go on:"], map(str, range(30))), 0),
        (texts(map(str, range(30)), ["### Response:"]), 0),
        ([{"chosen": f"{n}?\nyes", "rejected": f"{n}?\nno"} for n in range(30)], 0),
        (many(30), 0),
    ],
)
def test_first_lines_on_both_sides_of_the_split_are_counted(tmp_path, rows, expected):
    """Responses that begin alike hide where the prompt ends."""
    found = read(write_rows(tmp_path / "a.jsonl", rows), val_size=6)
    assert count_shared_lines(found.train, found.val) == expected


def test_hh_rlhf_without_its_empty_lines_is_a_dialogue(tmp_path):
    row = {"chosen": "Human: Hi\n\nAssistant: Ho", "rejected": "Human: Hi\n\nAssistant: No"}
    assert only(tmp_path, row).prompt == (ASKED,)
    text = {"chosen": "Human: a history", "rejected": "Human: another"}
    assert only(tmp_path, text).chosen.text == "Human: a history"


def test_pairs_that_differ_in_white_space_alone_contradict_nothing(tmp_path):
    rows = [{"prompt": "Hi", "chosen": f"Ho {k}", "rejected": f"ho {k} "} for k in range(4)]
    rows += [{"prompt": "Hi", "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "Hi", "chosen": "b", "rejected": "a"}]
    found = read(write_rows(tmp_path / "a.jsonl", rows))
    assert found.statistics()["contradictions"] == 1


def test_preferences_of_llama_factory(tmp_path):
    turns = [{"from": "human", "value": "Hi"}]
    row = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "Ho"},
        "rejected": {"from": "gpt", "value": "No"},
    }
    pair = only(tmp_path, row)
    assert pair.prompt == (ASKED,)
    assert [side.messages[-1]["content"] for side in pair.sides] == ["Ho", "No"]
