"""TRL's trainers as they are under our mixin, as a command that no user has.

It shows what no command of llmctl's does: pairs of answers, streams, labels that are all masked.
Its data, tokenizer and model are made on the spot. Its run directory, checkpoints, errors and exit
codes are those of a command.
"""

import argparse
import sys
from copy import deepcopy
from pathlib import Path

from llmctl import console, rundir
from llmctl.config.sections import Optimizer, Resumable
from llmctl.errors import UserError

SUBJECTS = ["the cat", "a dog", "my friend", "the old man", "our teacher"]
VERBS = ["sees", "likes", "finds", "follows", "remembers"]
OBJECTS = ["the river", "a red ball", "the house", "many stars", "a song"]


class Proof(Optimizer, Resumable):
    """Fields that the proof takes; as a recipe they are what a real command records."""

    kind: str = "sft"
    max_steps: int = 12
    batch_size: int = 4
    grad_accum: int = 1
    eval_every: int = 4
    save_every: int = 4
    early_stop: int | None = None
    hidden: int = 32
    rows: int = 60
    lora: bool = False
    streaming: bool = False
    group_by_length: bool = False
    no_eval: bool = False
    masked: bool = False
    log_every: int = 1


def main(arguments: list[str]) -> int:
    """Run with these arguments; the exit code."""
    console.set_up(quiet=False)
    try:
        train(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


def parse(arguments: list[str]) -> Proof:
    """Flags as `llmctl` would take them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, required=True)
    for name, field in Proof.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if name == "resume_allow":
            parser.add_argument(flag, action="append")
        elif field.default is False:
            parser.add_argument(flag, action="store_true", default=None)
        elif name != "out":
            parser.add_argument(flag)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    return Proof(**given)


def train(config: Proof) -> None:
    """Build, fit, save: a stage in small."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from safetensors.torch import save_file

    from llmctl.training.guard import open_together
    from llmctl.training.state import weights

    set_seed(config.seed)
    with open_together(Accelerator(cpu=True), "sft", config) as run:
        trainer = build(config, run)
        result = trainer.fit(config)
        (run.path / "model").mkdir()
        save_file(weights(trainer.model), run.path / "model" / "model.safetensors")
        run.record(result={"out": str(config.out), **result})


def build(config: Proof, run: rundir.Run):
    """The trainer under the mixin."""
    import datasets
    from peft import LoraConfig

    from llmctl.training.job import Rhythm
    from llmctl.training.trl import Reliable, Terms

    datasets.disable_progress_bars()
    texts = sentences(config.rows + 8)
    examples = [example(config.kind, text) for text in texts]
    rows = datasets.Dataset.from_list(examples[8:])
    held_out = datasets.Dataset.from_list(examples[:8])
    tokenizer = make_tokenizer(texts)
    if config.streaming:
        rows = rows.to_iterable_dataset(num_shards=2).shuffle(seed=config.seed, buffer_size=16)
    rhythm = Rhythm(
        max_steps=config.max_steps,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        keep=config.keep,
        early_stop=config.early_stop,
        on_nan=config.on_nan,
        max_nan_skips=config.max_nan_skips,
    )
    identity = {"data": config.rows, "streaming": config.streaming}
    base, args = trainer_of(config, run.path)
    model = make_model(config, len(tokenizer))
    trainer = type("ReliableTrainer", (Reliable, base), {})(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=None if config.no_eval else held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_dropout=0.1) if config.lora else None,
        terms=Terms(run, rhythm, identity, config.group_by_length),
        **({"ref_model": deepcopy(model)} if config.kind == "dpo" else {}),
    )
    if config.masked:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: mask_all(collate(rows))
    return trainer


def trainer_of(config: Proof, out: Path):
    """One of TRL's trainers, and its arguments."""
    import trl

    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}[config.kind]
    own = {"dataset_text_field": "text"} if config.kind == "sft" else {"disable_dropout": False}
    args = getattr(trl, f"{name}Config")(
        output_dir=str(out),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.lr or 1e-2,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        seed=config.seed,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        max_length=32,
        **own,
    )
    return getattr(trl, f"{name}Trainer"), args


def example(kind: str, text: str) -> dict[str, str]:
    """A text as this trainer takes it; the answer refused has its words the other way round."""
    if kind == "sft":
        return {"text": text}
    words = text.split()
    if kind == "reward":
        return {"chosen": text, "rejected": " ".join(words[::-1])}
    prompt, answer = words[:2], words[2:]
    answers = {"chosen": answer, "rejected": answer[::-1]}
    return {"prompt": " ".join(prompt), **{k: " " + " ".join(v) for k, v in answers.items()}}


def sentences(count: int) -> list[str]:
    """Simple English of unequal length."""
    parts = [f"{s} {v} {o}" for v in VERBS for o in OBJECTS for s in SUBJECTS]
    return [
        " and ".join(parts[(i * 7 + k) % len(parts)] for k in range(1 + i % 3))
        for i in range(count)
    ]


def make_tokenizer(texts: list[str]):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *sorted({w for text in texts for w in text.split()})]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(config: Proof, vocabulary: int):
    """A Llama of two layers with dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden,
        intermediate_size=2 * config.hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    if config.kind == "reward":
        shape.num_labels = 1
        return LlamaForSequenceClassification(shape)
    return LlamaForCausalLM(shape)


def mask_all(batch):
    """Data that has nothing to learn."""
    return {**batch, "labels": batch["labels"].fill_(-100)}
