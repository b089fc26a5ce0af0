"""Tasks of lm-eval: each kind against plain forward passes, and examples that give nothing away."""

import json
import math
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from llmctl.models.loading import load_causal_lm, load_tokenizer
from tests.conftest import sentences
from tests.run_files import write_rows

pytestmark = [
    pytest.mark.slow,  # importing lm-eval takes seconds
    pytest.mark.filterwarnings("ignore"),
]
PAIRS = [
    ("The cat", "sees the river."),
    ("A dog", "likes a red ball."),
    ("My friend", "finds a song."),
    ("The old man", "paints the house."),
]
LONG = " ".join(sentences(30, seed=5))
METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("bits_per_byte", "word_perplexity"),
    "generate_until": ("exact_match",),
}
PICK = "doc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
SAY = "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
LAST = "doc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\n"
WHOLE = "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
STOPS = "generation_kwargs: {max_gen_toks: 6, until: ['.'], do_sample: false}\n"


def write_task(folder, name, kind, fields, **splits):
    """A task on local rows; `splits` are its splits, of which the test's comes last."""
    files = "".join(
        f"    {split}: {write_rows(folder / f'{name}-{split}.jsonl', rows)}\n"
        for split, rows in splits.items()
    )
    listed = "".join(f"  - metric: {metric}\n" for metric in METRICS[kind])
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n{files}"
        f"output_type: {kind}\n{fields}metric_list:\n{listed}metadata: {{version: 1}}\n"
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


@pytest.fixture
def evaluate(cli, folder):
    def run(model, names, *more):
        where = ("--task-path", folder, "--plain", "--threads", 1, "--json")
        return cli("evaluate", "--model", model, "--tasks", names, *where, *more)

    return run


class Plain:
    """A model asked by plain forward passes, one text at a time, without a cache."""

    def __init__(self, run):
        self.model = load_causal_lm(str(run), dtype=torch.float32)
        self.tokenizer = load_tokenizer(str(run))
        self.before = self.tokenizer.bos_token_id

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logs(self, tokens):
        return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].double(), -1)

    def continued(self, prompt, answer):
        """Log probability of an answer, and whether it is the likeliest."""
        whole = [self.before, *self.encode(prompt + answer)]
        start = 1 + len(self.encode(prompt))
        logs = self.logs(whole)
        total = sum(float(logs[i - 1, whole[i]]) for i in range(start, len(whole)))
        greedy = all(int(logs[i - 1].argmax()) == whole[i] for i in range(start, len(whole)))
        return total, greedy

    def response(self, prompt, most, stop):
        tokens, said = [self.before, *self.encode(prompt)], []
        while len(said) < most and stop not in self.tokenizer.decode(said):
            said.append(int(self.logs([*tokens, *said])[-1].argmax()))
            if said[-1] == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(said, skip_special_tokens=True).split(stop)[0]

    def nats(self, text, context):
        """Nats of a text in windows: each reads `context` tokens before its last."""
        tokens, nats, done = [self.before, *self.encode(text)], 0.0, 1
        while done < len(tokens):
            end = min(done + context, len(tokens))
            first = max(0, end - context - 1)
            logs = self.logs(tokens[first : end - 1])
            nats -= sum(float(logs[i - 1 - first, tokens[i]]) for i in range(done, end))
            done = end
        return nats


def write_every_kind(folder, plain):
    said = [plain.response(q, 6, ".") for q, _ in PAIRS]
    rows = [{"q": q, "choices": [a, "a a a."], "gold": 0} for q, a in PAIRS]
    write_task(folder, "pick", "multiple_choice", f"test_split: test\n{PICK}", test=rows)
    rows = [{"q": q, "a": a.split()[0]} for q, a in PAIRS]
    write_task(folder, "last", "loglikelihood", f"test_split: test\n{LAST}", test=rows)
    rows = [{"text": text} for text in (PAIRS[0][0], LONG)]
    write_task(folder, "whole", "loglikelihood_rolling", f"test_split: test\n{WHOLE}", test=rows)
    rows = [{"q": q, "a": "?" if k == 1 else said[k]} for k, (q, _) in enumerate(PAIRS)]
    write_task(folder, "say", "generate_until", f"test_split: test\n{SAY}{STOPS}", test=rows)


def expected_figures(plain, context=128):
    choices = [[plain.continued(q, f" {a}") for a in (r, "a a a.")] for q, r in PAIRS]
    right = [c[0][0] > c[1][0] for c in choices]
    per_letter = [
        c[0][0] / len(r) > c[1][0] / len("a a a.") for c, (_, r) in zip(choices, PAIRS, strict=True)
    ]
    lasts = [plain.continued(q, f" {a.split()[0]}") for q, a in PAIRS]
    nats = sum(plain.nats(text, context) for text in (PAIRS[0][0], LONG))
    words = sum(len(text.split()) for text in (PAIRS[0][0], LONG))
    size = sum(len(text.encode()) for text in (PAIRS[0][0], LONG))
    return {
        "pick/acc": sum(right) / 4,
        "pick/acc_norm": sum(per_letter) / 4,
        "last/acc": sum(greedy for _, greedy in lasts) / 4,
        "last/perplexity": math.exp(-sum(total for total, _ in lasts) / 4),
        "whole/bits_per_byte": nats / math.log(2) / size,
        "whole/word_perplexity": math.exp(nats / words),
        "say/exact_match": 0.75,
    }


def test_each_kind_of_task_is_what_plain_forward_passes_give(evaluate, roomy, folder):
    plain = Plain(roomy)
    assert plain.tokenizer("")["input_ids"] == [plain.before]
    write_every_kind(folder, plain)
    result = evaluate(roomy, "pick,last,whole,say")
    assert result.code == 0, result.err
    expected = expected_figures(plain)
    found = json.loads(result.out)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert "lost their beginning" not in result.err
    cut = evaluate(roomy, "whole,last,say", "--context", 8, "--shots", 2)
    shorter = json.loads(cut.out)
    nats = expected_figures(plain, 8)["whole/bits_per_byte"]
    assert shorter["whole/bits_per_byte"] == pytest.approx(nats, rel=1e-4)
    assert "whole takes no examples: --shots is not heeded" in cut.err
    assert "last: 4 texts are longer than the context of 8 tokens" in cut.err
    assert "say: 4 texts are longer than the context of 8 tokens" in cut.err


@pytest.mark.parametrize("frame", ["<bos> $A <eos>", "$A <eos>", "$A"])
def test_what_a_tokenizer_puts_around_texts_changes_only_their_beginning(
    cli, evaluate, roomy, folder, tmp_path, frame
):
    plain = Plain(roomy)
    names = {"<bos>": plain.tokenizer.bos_token, "<eos>": plain.tokenizer.eos_token}
    for mark, name in names.items():
        frame = frame.replace(mark, name)
    model = shutil.copytree(roomy / "model", tmp_path / "framed")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    special = [(name, tokenizer.token_to_id(name)) for name in names.values()]
    tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    tokenizer.save(str(model / "tokenizer.json"))
    write_every_kind(folder, plain)
    result = evaluate(model, "pick,last,whole,say")
    assert result.code == 0, result.err
    found, expected = json.loads(result.out), expected_figures(plain)
    whole = write_rows(tmp_path / "whole.jsonl", [{"text": t} for t in (PAIRS[0][0], LONG)])
    own = cli(
        *("evaluate", "--model", model, "--data", whole, "--no-end", "--threads", 1, "--json"),
        *("--context", 128, "--stride", 128),
    )
    if frame.startswith("$A"):  # the end of the document before stands where BOS would
        plain.before = plain.tokenizer.eos_token_id
        names = ("whole/bits_per_byte", "whole/word_perplexity")
        expected = {name: expected_figures(plain)[name] for name in names}
    else:
        assert json.loads(own.out)["tokens"] == sum(
            len(plain.encode(text)) for text in (PAIRS[0][0], LONG)
        )
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    short = cli("evaluate", "--model", model, "--data", whole, "--no-end", "--limit", 1, "--json")
    nats = plain.nats(PAIRS[0][0], 128) / math.log(2) / len(PAIRS[0][0])
    assert json.loads(short.out)["bits_per_byte"] == pytest.approx(nats, rel=1e-4)


def test_a_prompt_in_the_template_has_the_tokens_of_chat(cli, roomy, folder, monkeypatch, tmp_path):
    """A template without BOS stays without it, as in training; one that writes it has it once."""
    from llmctl.evaluate.harness import HarnessModel

    found, real = [], HarnessModel.tok_batch_encode

    def watched(self, *args, **kwargs):
        ids, mask = real(self, *args, **kwargs)
        found.extend(row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True))
        return ids, mask

    monkeypatch.setattr(HarnessModel, "tok_batch_encode", watched)
    rows = [{"q": q, "a": a} for q, a in PAIRS]
    write_task(folder, "say", "generate_until", f"test_split: test\n{SAY}{STOPS}", test=rows)
    model = shutil.copytree(roomy / "model", tmp_path / "model")
    template = load_tokenizer(str(model)).chat_template
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for text in (template, bare):
        (model / "chat_template.jinja").write_text(text)
        found.clear()
        asked = ("--tasks", "say", "--task-path", folder, "--threads", 1)
        result = cli("evaluate", "--model", model, *asked)
        assert result.code == 0, result.err
        tokenizer = load_tokenizer(str(model))
        assert tokenizer.chat_template == text
        expected = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
            )
            for q, _ in PAIRS
        ]
        assert sorted(found) == sorted(expected)
        assert all(row.count(tokenizer.bos_token_id) == (text == template) for row in found)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that lm-eval asks the model to continue."""
    from llmctl.evaluate.harness import HarnessModel

    found, real = [], HarnessModel.generate_until

    def watched(self, requests, *args, **kwargs):
        found.extend(request.args[0] for request in requests)
        return real(self, requests, *args, **kwargs)

    monkeypatch.setattr(HarnessModel, "generate_until", watched)
    return found


ROWS = [{"q": f"Row {k} has", "a": f"word{k}"} for k in range(5)]
TWICE = [*ROWS, *({**row, "id": 1} for row in ROWS)]


@pytest.mark.parametrize(
    ("splits", "fields"),
    [
        ({"test": ROWS}, "test_split: test\n"),
        ({"validation": ROWS}, "validation_split: validation\n"),
        ({"validation": ROWS}, "validation_split: validation\nfewshot_split: validation\n"),
        ({"test": ROWS}, "test_split: test\nfewshot_split: test\n"),
        ({"test": ROWS}, "test_split: test\nfewshot_config: {sampler: first_n}\n"),
        ({"train": ROWS, "test": ROWS[:3]}, "training_split: train\ntest_split: test\n"),
        ({"test": [{**row, "id": 0} for row in ROWS] + TWICE[5:]}, "test_split: test\n"),
    ],
)
def test_no_prompt_holds_the_answer_to_its_question(
    evaluate, roomy, folder, prompts, splits, fields
):
    write_task(folder, "leak", "generate_until", f"{fields}{SAY}{STOPS}", **splits)
    result = evaluate(roomy, "leak", "--shots", 3)
    assert result.code == 0, result.err
    assert len(prompts) == len(splits.get("test", ROWS))
    for prompt in prompts:
        *examples, question = prompt.split("\n\n")
        assert len(examples) == 3
        assert not any(example.startswith(question) for example in examples)
    again = len(prompts)
    evaluate(roomy, "leak", "--shots", 3)
    assert prompts[again:] == prompts[:again]


def test_examples_that_ask_something_else_are_those_of_lm_eval(evaluate, roomy, folder, prompts):
    """Where nothing is in the way, the examples are those of published figures."""
    from lm_eval.api.samplers import ContextSampler

    rows = [{"q": f"Other {k} has", "a": f"thing{k}"} for k in range(20)]
    fields = "training_split: train\ntest_split: test\n"
    write_task(folder, "apart", "generate_until", f"{fields}{SAY}{STOPS}", train=rows, test=ROWS)
    assert evaluate(roomy, "apart", "--shots", 2, "--seed", 4).code == 0
    sampler = ContextSampler(rows, rnd=4)
    for row, prompt in zip(ROWS, prompts, strict=True):
        shots = [f"{shot['q']} {shot['a']}\n\n" for shot in sampler.sample(2)]
        assert prompt == "".join(shots) + row["q"]


def test_too_few_rows_for_the_examples_are_refused(evaluate, roomy, folder):
    write_task(folder, "few", "generate_until", f"test_split: test\n{SAY}{STOPS}", test=ROWS)
    for shots, code in ((4, 0), (5, 3), (9, 3)):
        result = evaluate(roomy, "few", "--shots", shots, "--limit", 1)
        assert result.code == code, result.err
    assert "few is to show 9 examples, and has only 4 rows that ask something else" in result.err
    assert "show fewer: --shots 4" in result.err
    own = f"test_split: test\n{SAY}{STOPS}num_fewshot: 2\n"
    write_task(folder, "own", "generate_until", own, test=ROWS[:2])
    result = evaluate(roomy, "own", "--limit", 1)
    assert result.code == 3, "as many as the task itself asks for"
    assert "own is to show 2 examples, and has only 1 row that asks something else" in result.err


def test_what_does_not_fit_the_context_is_refused(evaluate, roomy, folder):
    more = STOPS.replace("6", "128")
    write_task(folder, "more", "generate_until", f"test_split: test\n{SAY}{more}", test=ROWS)
    result = evaluate(roomy, "more")
    assert result.code == 4
    assert "more generates 128 tokens, and the context of the model has 128" in result.err
    rows = [{"q": "The cat", "a": LONG}]
    write_task(folder, "long", "loglikelihood", f"test_split: test\n{LAST}", test=rows)
    result = evaluate(roomy, "long")
    assert result.code == 3
    assert "cannot be scored in a context of 128" in result.err
    assert evaluate(roomy, "long", "--context", 500).code == 2
