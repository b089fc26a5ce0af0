"""TRL's trainers as oracles: the same batch and weights, the same loss and gradients.

Each is built as its users build it, from a data set with its own columns, and gives the batch of
its own data loader. What it computes wrongly is computed here in plain Python floats.
"""

import math
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.data.preference_pairs import Pairs, load_dpo_data
from llmctl.data.tokenized import EncodedSequence, collect
from llmctl.training.adapters import adapt
from llmctl.training.batches import SequenceRows
from llmctl.training.dpo import ComparedPairRows, DirectPreference, DpoLoss
from llmctl.training.objective import scaled
from llmctl.training.reward import PairwisePreference, ScoredPairRows
from llmctl.training.sft import SupervisedTokens
from llmctl.training.token_loss import token_loss_of
from tests.training.objectives import RECORDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PAD = 0
CLOSE = 1e-5


@pytest.fixture(scope="module")
def trl():
    """TRL, whose import takes seconds."""
    import trl

    return trl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of two layers without dropout, and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("oracles") / "llama"
    RECORDER.write_model(folder, "llama")
    return folder


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Make arguments of a trainer: `arguments(trl.SFTConfig, max_length=None)`."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

    def make(kind, **options):
        plain = {
            "output_dir": str(tmp_path / "trl"),
            "per_device_train_batch_size": 6,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "seed": 1,
        }
        return kind(**{**plain, **options})

    return make


def dataset_of(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def language_model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def scorer(base):
    """A model with a score head whose weights are no rounding."""
    torch.manual_seed(5)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(std=1.0)
    model.config.pad_token_id = PAD
    return model


def move(model, seed=7):
    """Change every weight that trains, so that no gradient is 0 and no reward either."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))


def completions(count=12):
    """Prompts with completions of many lengths."""
    return [
        {"prompt": row["prompt"] + " ", "completion": row["chosen"]}
        for row in RECORDER.pairs(count)
    ]


def rows_of(batch, trained):
    """(tokens, whether each is trained on) of each row of TRL's batch, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], trained, strict=True)
    return [
        (ids[mask.bool()].tolist(), counts[mask.bool()].bool().tolist())
        for ids, mask, counts in rows
    ]


def tokenized(rows):
    return collect([[EncodedSequence(tokens, trained, True)] for tokens, trained in rows])


def backward(trainer, batch):
    """Loss and gradients by name, as TRL computes them."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return float(loss.detach()), gradients_of(trainer.model)


def our_backward(objective, model, batch):
    """Loss and gradients by name, as the loop computes them."""
    model.train()
    model.zero_grad()
    loss = objective.loss(model, batch)
    share = scaled(loss, loss.weight, 1, 1)
    share.backward()
    return float(share.detach()), gradients_of(model)


def gradients_of(model):
    named = model.named_parameters()
    return {name: w.grad.clone() for name, w in named if w.requires_grad and w.grad is not None}


def assert_same(ours, theirs):
    (loss, gradients), (expected, wanted) = ours, theirs
    assert loss == pytest.approx(expected, rel=CLOSE)
    assert set(gradients) == set(wanted)
    assert len(wanted) > 10
    for name, gradient in gradients.items():
        assert float(wanted[name].norm()) > 0, name
        difference = float((gradient - wanted[name]).norm() / wanted[name].norm())
        assert difference < CLOSE, name


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


# --- supervised fine-tuning


@pytest.mark.parametrize("chunked", [False, True])
def test_supervised_loss_is_that_of_sft_trainer(trl, base, tokenizer, arguments, chunked):
    model = language_model(base)
    trainer = trl.SFTTrainer(
        model=deepcopy(model),
        args=arguments(trl.SFTConfig, max_length=None),
        train_dataset=dataset_of(completions()),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 2
    assert 0 < int((batch["labels"] != -100).sum()) < sum(lengths)
    data = tokenized(rows_of(batch, batch["labels"] != -100))
    objective = SupervisedTokens(token_loss_of(model, chunked=chunked), None)
    ours = our_backward(objective, model, SequenceRows(data, PAD).batch(range(len(data))))
    assert_same(ours, backward(trainer, batch))


def test_supervised_loss_of_packed_rows_is_that_of_sft_trainer(trl, base, tokenizer, arguments):
    model = language_model(base)
    trainer = trl.SFTTrainer(
        model=deepcopy(model),
        args=arguments(trl.SFTConfig, max_length=96, packing=True, per_device_train_batch_size=3),
        train_dataset=dataset_of(completions(16)),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    assert "attention_mask" not in batch
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), None]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    parts = [slice(first, last) for first, last in pairwise(starts)]
    rows = [(ids[part].tolist(), (labels[part] != -100).tolist()) for part in parts]
    assert len(rows) > 3
    packed = SequenceRows(tokenized(rows), PAD, size=96)
    assert len(packed) < len(rows)
    objective = SupervisedTokens(token_loss_of(model, chunked=False), None)
    ours = our_backward(objective, model, packed.batch(range(len(packed))))
    assert_same(ours, backward(trainer, batch))


def test_supervised_loss_of_an_adapter_is_that_of_sft_trainer(trl, base, tokenizer, arguments):
    config = SftConfig(model=str(base), data=["x"], lora=True, lora_r=4, lora_alpha=12.0)
    model = adapt(language_model(base), config)
    trainer = trl.SFTTrainer(
        model=language_model(base),
        args=arguments(trl.SFTConfig, max_length=None),
        train_dataset=dataset_of(completions()),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    share_adapter(trainer.model, model)
    batch = batch_of(trainer)
    data = tokenized(rows_of(batch, batch["labels"] != -100))
    objective = SupervisedTokens(token_loss_of(model, chunked=False), None)
    ours = our_backward(objective, model, SequenceRows(data, PAD).batch(range(len(data))))
    assert_same(ours, backward(trainer, batch))


def lora():
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=12, target_modules="all-linear")


def share_adapter(theirs, ours):
    """Give both the same adapter, whose second matrix is not 0."""
    move(theirs)
    trained = {n: w.detach().clone() for n, w in theirs.named_parameters() if w.requires_grad}
    assert trained.keys() == {n for n, w in ours.named_parameters() if w.requires_grad}
    ours.load_state_dict(trained, strict=False)


# --- reward


def preferences(count=12, *, margins=False):
    """Pairs of texts, with an end that TRL does not add twice."""
    return [
        {**row, "prompt": row["prompt"] + " "} for row in RECORDER.pairs(count, margins=margins)
    ]


def scored(batch):
    """TRL's batch of a reward trainer as our pairs."""
    rows = rows_of(batch, torch.zeros_like(batch["input_ids"]))
    half = len(rows) // 2
    return pairs_of(rows[:half], rows[half:], batch.get("margin"))


def pairs_of(chosen, rejected, margins=None):
    count = len(chosen)
    return Pairs(
        tokenized(chosen),
        tokenized(rejected),
        np.zeros(count, np.float32) if margins is None else margins.numpy(),
        np.ones(count, np.float32),
        np.arange(count),
        cut=0,
        dropped=0,
        same=0,
    )


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("margins", [False, True])
def test_preference_loss_is_that_of_reward_trainer(
    trl, base, tokenizer, arguments, margins, center
):
    model = scorer(base)
    trainer = trl.RewardTrainer(
        model=deepcopy(model),
        args=arguments(trl.RewardConfig, max_length=None, center_rewards_coefficient=center),
        train_dataset=dataset_of(preferences(margins=margins)),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    assert ("margin" in batch) == margins
    data = ScoredPairRows(scored(batch), PAD, uses_token_types=False)
    ours = our_backward(PairwisePreference(center or 0.0, None), model, data.batch(range(6)))
    assert_same(ours, backward(trainer, batch))


# --- direct preference optimisation


def compared(batch):
    """TRL's batch of a DPO trainer as our pairs."""
    rows = rows_of(batch, batch["completion_mask"])
    half = len(rows) // 2
    return ComparedPairRows(pairs_of(rows[:half], rows[half:]), PAD)


def preference_objective(model, pairs, loss, beta):
    """Our objective, its reference measured on the model as it is now."""
    objective = DirectPreference(
        DpoLoss(loss, beta), token_loss_of(model, chunked=False), model, pairs, None, None
    )
    objective.measure_reference(model, Accelerator(cpu=True), 4, "cpu", "fp32")
    return objective


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_direct_preference_is_that_of_dpo_trainer(trl, base, tokenizer, arguments, loss):
    model, policy = language_model(base), language_model(base)
    move(policy)
    trainer = trl.DPOTrainer(
        model=deepcopy(policy),
        ref_model=language_model(base),
        args=arguments(trl.DPOConfig, max_length=None, loss_type=[loss], beta=0.3),
        train_dataset=dataset_of(preferences()),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    pairs = compared(batch)
    objective = preference_objective(model, pairs, loss, 0.3)
    model.load_state_dict(policy.state_dict())
    ours = our_backward(objective, model, pairs.batch(range(6)))
    assert_same(ours, backward(trainer, batch))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_direct_preference_of_an_adapter_is_that_of_dpo_trainer(
    trl, base, tokenizer, arguments, loss
):
    """The reference is the base below it."""
    config = DpoConfig(model=str(base), data=["x"], lora=True, lora_r=4, lora_alpha=12.0)
    model = adapt(language_model(base), config)
    trainer = trl.DPOTrainer(
        model=language_model(base),
        args=arguments(trl.DPOConfig, max_length=None, loss_type=[loss], beta=0.3),
        train_dataset=dataset_of(preferences()),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    share_adapter(trainer.model, model)
    batch = batch_of(trainer)
    pairs = compared(batch)
    objective = preference_objective(model, pairs, loss, 0.3)
    ours = our_backward(objective, model, pairs.batch(range(6)))
    assert_same(ours, backward(trainer, batch))


# --- where TRL is wrong


def train_one_step(trainer):
    """Gradients of TRL's first step: what plain gradient descent at rate 1 takes away."""
    before = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - w.detach() for name, w in trainer.model.named_parameters()}


ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
}


def probabilities(logits):
    """Softmax of a list of floats."""
    most = max(logits)
    powers = [math.exp(value - most) for value in logits]
    return [power / sum(powers) for power in powers]


def log_probability(model, tokens, trained):
    """Of the trained tokens of a sequence, added up one by one."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].tolist()
    return sum(
        math.log(probabilities(logits[place - 1])[tokens[place]])
        for place in range(1, len(tokens))
        if trained[place]
    )


def score(model, tokens):
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([tokens])).logits)


def softplus(value):
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def test_reward_trainer_takes_a_mean_of_means_where_a_micro_batch_is_short(
    trl, base, tokenizer, arguments
):
    """Of 5 pairs in micro-batches of 4 and 1, TRL gives the last as much weight as four others.

    The right loss is the mean over the 5 pairs, which ours is however they are cut.
    """
    model, rows = scorer(base), preferences(5)
    trainer = trl.RewardTrainer(
        model=deepcopy(model),
        args=arguments(
            trl.RewardConfig,
            max_length=None,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **ONE_STEP,
        ),
        train_dataset=dataset_of(rows),
        processing_class=tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["input_ids"]) // 2 for batch in batches] == [4, 1]
    sides = [halves(rows_of(batch, batch["attention_mask"])) for batch in batches]
    whole = [pair for chosen, rejected in sides for pair in zip(chosen, rejected, strict=True)]
    losses = [
        softplus(score(model, rejected) - score(model, chosen))
        for (chosen, _), (rejected, _) in whole
    ]
    right = sum(losses) / 5
    wrong = (sum(losses[:4]) / 4 + losses[4]) / 2
    assert abs(wrong - right) > 1e-3
    theirs = train_one_step(trainer)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wrong, rel=1e-4)
    data = ScoredPairRows(pairs_of(*halves_of(whole)), PAD, uses_token_types=False)
    objective = PairwisePreference(0.0, None)
    assert accumulated(objective, model, data, [range(5)])[0] == pytest.approx(right, rel=CLOSE)
    cut = accumulated(objective, model, data, [range(4), [4]])
    assert cut[0] == pytest.approx(right, rel=CLOSE)
    assert_same(cut, accumulated(objective, model, data, [range(5)]))
    assert_mean_of_means(theirs, objective, model, data)


def assert_mean_of_means(gradients, objective, model, data):
    """The gradients of the first four pairs and of the fifth, each a mean, added up by halves."""
    (_, four), (_, fifth) = (
        accumulated(objective, model, data, [part]) for part in (range(4), [4])
    )
    _, right = accumulated(objective, model, data, [range(5)])
    for name, gradient in right.items():
        wrong = (four[name] + fifth[name]) / 2
        assert float((gradients[name] - wrong).norm()) < 1e-3 * float(wrong.norm()), name
        assert float((gradients[name] - gradient).norm()) > 1e-2 * float(gradient.norm()), name


def halves(rows):
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def halves_of(pairs):
    return [chosen for chosen, _ in pairs], [rejected for _, rejected in pairs]


def accumulated(objective, model, data, parts):
    """Loss and gradients of a step that is cut into these micro-batches, as the loop adds them."""
    model.train()
    model.zero_grad()
    total, weight = 0.0, float(sum(data.weights[list(part)].sum() for part in parts))
    for part in parts:
        share = scaled(objective.loss(model, data.batch(part)), weight, len(parts), 1)
        share.backward()
        total += float(share.detach())
    return total, gradients_of(model)


def test_dpo_trainer_takes_a_mean_of_means_where_a_micro_batch_is_short(
    trl, base, tokenizer, arguments
):
    """Of 5 pairs in micro-batches of 4 and 1, TRL gives the last as much weight as four others."""
    model, policy, rows = language_model(base), language_model(base), preferences(5)
    move(policy)
    trainer = trl.DPOTrainer(
        model=deepcopy(policy),
        ref_model=language_model(base),
        args=arguments(
            trl.DPOConfig,
            max_length=None,
            beta=0.3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **ONE_STEP,
        ),
        train_dataset=dataset_of(rows),
        processing_class=tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    sides = [halves(rows_of(batch, batch["completion_mask"])) for batch in batches]
    whole = [pair for chosen, rejected in sides for pair in zip(chosen, rejected, strict=True)]
    losses = []
    for chosen, rejected in whole:
        gains = [
            log_probability(policy, *side) - log_probability(model, *side)
            for side in (chosen, rejected)
        ]
        losses.append(softplus(-0.3 * (gains[0] - gains[1])))
    right, wrong = sum(losses) / 5, (sum(losses[:4]) / 4 + losses[4]) / 2
    assert abs(wrong - right) > 1e-3
    theirs = train_one_step(trainer)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wrong, rel=1e-4)
    data = ComparedPairRows(pairs_of(*halves_of(whole)), PAD)
    objective = preference_objective(model, data, "sigmoid", 0.3)
    model.load_state_dict(policy.state_dict())
    cut = accumulated(objective, model, data, [range(4), [4]])
    assert cut[0] == pytest.approx(right, rel=CLOSE)
    assert_same(cut, accumulated(objective, model, data, [range(5)]))
    assert_mean_of_means(theirs, objective, model, data)


def test_dpo_trainer_cuts_the_ends_of_responses_and_ours_the_beginning_of_the_prompt(
    trl, base, tokenizer, arguments, tmp_path
):
    """What TRL compares then has no end: the right figure is that of the whole responses."""
    rows = [{**row, "prompt": row["prompt"] + " . . . . . . . . ."} for row in preferences(4)]
    size, end = 30, tokenizer.eos_token_id
    policy, reference = language_model(base), language_model(base)
    move(policy)
    trainer = trl.DPOTrainer(
        model=deepcopy(policy),
        ref_model=language_model(base),
        args=arguments(trl.DPOConfig, max_length=size, beta=0.3, per_device_train_batch_size=4),
        train_dataset=dataset_of(rows),
        processing_class=tokenizer,
    )
    theirs = rows_of(batch_of(trainer), batch_of(trainer)["completion_mask"])
    assert not all(tokens[-1] == end for tokens, _ in theirs), "some responses lost their end"

    RECORDER.write_rows(tmp_path / "rows.jsonl", rows)
    config = DpoConfig(
        model=str(base),
        data=[str(tmp_path / "rows.jsonl")],
        max_length=size,
        val_size=0,
        out=str(tmp_path / "run"),
    )
    pairs = load_dpo_data(config).train
    data = ComparedPairRows(pairs, PAD)
    sides = [
        [(tokens.tolist(), trained.tolist()) for tokens, trained in map(side.sequence, range(4))]
        for side in (pairs.chosen, pairs.rejected)
    ]
    for tokens, trained in (*sides[0], *sides[1]):
        assert len(tokens) <= size
        assert trained[-1], "every response is whole, up to the token that ends it"
    losses = []
    for chosen, rejected in zip(*sides, strict=True):
        gains = [
            log_probability(policy, *side) - log_probability(reference, *side)
            for side in (chosen, rejected)
        ]
        losses.append(softplus(-0.3 * (gains[0] - gains[1])))
    model = language_model(base)
    objective = preference_objective(model, data, "sigmoid", 0.3)
    model.load_state_dict(policy.state_dict())
    loss, _ = our_backward(objective, model, data.batch(range(4)))
    assert loss == pytest.approx(sum(losses) / 4, rel=CLOSE)


def test_sft_trainer_trains_on_sequences_that_it_cut_and_ours_can_leave_them_out(
    trl, base, tokenizer, arguments
):
    """A completion without its end teaches a model not to stop: `--truncation drop` has none."""
    rows, end = completions(), tokenizer.eos_token_id
    size = sorted(len(tokens) for tokens, _ in batch_rows(trl, base, tokenizer, arguments, rows))[5]
    theirs = batch_rows(trl, base, tokenizer, arguments, rows, size)
    cut = [tokens for tokens, _ in theirs if tokens[-1] != end]
    assert 0 < len(cut) < len(rows)
    whole = batch_rows(trl, base, tokenizer, arguments, rows)
    data = tokenized(whole).truncated(size, "drop")
    kept = [data.sequence(number) for number in range(len(data))]
    assert len(kept) == len(rows) - len(cut)
    assert all(tokens[-1] == end for tokens, _ in kept)
    model = language_model(base)
    sums = [log_probability(model, t.tolist(), c.tolist()) for t, c in kept]
    right = -sum(sums) / sum(int(trained[1:].sum()) for _, trained in kept)
    objective = SupervisedTokens(token_loss_of(model, chunked=False), None)
    loss, _ = our_backward(objective, model, SequenceRows(data, PAD).batch(range(len(data))))
    assert loss == pytest.approx(right, rel=CLOSE)


def batch_rows(trl, base, tokenizer, arguments, rows, max_length=None):
    """The rows of the one batch that SFTTrainer makes of all."""
    size = {"max_length": max_length, "per_device_train_batch_size": len(rows)}
    trainer = trl.SFTTrainer(
        model=language_model(base),
        args=arguments(trl.SFTConfig, **size),
        train_dataset=dataset_of(rows),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    return rows_of(batch, batch["labels"] != -100)
