"""The peer of ppo.py: one PPO run with TRL's PPOTrainer, in an environment with trl 1.12.

    python ppo_trl.py SETTINGS.json

SETTINGS are those of ppo.py, with `prompts`, `seed`, `ending` and `out`. Goes out: a line for each
step in OUT/metrics.jsonl, with the keys of llmctl's own. Nothing is saved, and nothing else is
logged.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Reads the time where a step's phases meet, and writes what TRL logs of a step."""

    def __init__(self, out: Path) -> None:
        """Open the file; `reward_model` is told later."""
        self.file = (out / "metrics.jsonl").open("w")
        self.reward_model: PreTrainedModel | None = None
        self.began = time.perf_counter()
        self.generation = self.scoring = self.lengths = 0.0
        self.updates = self.trained = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the functions that begin and end a phase of PPOTrainer.train."""
        ppo_trainer.batch_generation = self.generating(ppo_trainer.batch_generation)
        ppo_trainer.get_reward = self.rewarding(ppo_trainer.get_reward)
        ppo_trainer.masked_whiten = self.whitening(ppo_trainer.masked_whiten)
        optimizer.register_step_post_hook(self.updated)
        groups = [group["params"] for group in optimizer.param_groups]
        self.trained = sum(one.numel() for group in groups for one in group)

    def generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A rollout begins with generation."""

        def wrapped(*arguments: Any) -> Any:
            self.rollout_began = time.perf_counter()
            self.scoring = self.lengths = 0.0
            self.updates = 0
            result = function(*arguments)
            self.generation = time.perf_counter() - self.rollout_began
            return result

        return wrapped

    def rewarding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The value model and the reward model both read the responses here."""

        def wrapped(model: Any, texts: torch.Tensor, pad: int, context: int) -> Any:
            started = time.perf_counter()
            result = function(model, texts, pad, context)
            self.scoring += time.perf_counter() - started
            if model is self.reward_model:
                self.lengths += float((result[2] + 1 - context).sum())
            return result

        return wrapped

    def whitening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Whitening the advantages is the last that a rollout does, once a step."""

        def wrapped(*arguments: Any) -> Any:
            result = function(*arguments)
            self.update_began = time.perf_counter()
            return result

        return wrapped

    def updated(self, *_: Any) -> None:
        """Count what the optimizer really did."""
        self.updates += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line; TRL logs at the end of each step."""
        now = time.perf_counter()
        line = {
            "step": state.global_step,
            "time": now - self.began,
            "episodes": state.episode,
            "rollout_seconds": self.update_began - self.rollout_began,
            "generate_seconds": self.generation,
            "score_seconds": self.scoring,
            "update_seconds": now - self.update_began,
            "updates": self.updates,
            "trained_parameters": self.trained,
            "length": self.lengths / args.batch_size,
            "score": logs["objective/scores"],
            "kl": logs["objective/kl"],
        }
        print(json.dumps(line), file=self.file, flush=True)


def main() -> None:
    """Train as SETTINGS say."""
    settings = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    if settings.precision == "bf16":  # PPOTrainer's Accelerator hears of it in no other way
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    tokenizer = load_tokenizer(settings.model)
    clock = Clock(Path(settings.out))
    trainer = PPOTrainer(
        args=arguments(settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        ref_model=None,
        reward_model=load_reward(settings.reward_model),
        value_model=load_value(settings.reward_model, settings.value_lora),
        train_dataset=load_prompts(Path(settings.prompts), tokenizer, settings.batch_size),
        callbacks=[clock],
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if settings.lora
        else None,
    )
    clock.reward_model = trainer.reward_model
    clock.watch(trainer.optimizer.optimizer)
    trainer.train()


def arguments(settings: SimpleNamespace) -> PPOConfig:
    """TRL's names for the settings.

    With one micro-batch a step, `num_mini_batches` counts optimizer steps. With accumulation TRL
    would make fewer: it accumulates over the micro-batches of the step, not of a minibatch.
    """
    return PPOConfig(
        output_dir=settings.out,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=settings.minibatches,
        num_ppo_epochs=settings.ppo_epochs,
        total_episodes=settings.batch_size * settings.steps,
        local_rollout_forward_batch_size=settings.batch_size,
        response_length=settings.length,
        stop_token="eos" if settings.ending == "free" else None,
        temperature=settings.temperature,
        missing_eos_penalty=None,
        whiten_rewards=False,
        kl_coef=settings.kl_coef,
        kl_estimator="k1",
        cliprange=settings.clip,
        cliprange_value=settings.value_clip,
        vf_coef=settings.value_coef,
        gamma=settings.gamma,
        lam=settings.lam,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        bf16=settings.precision == "bf16",
        gradient_checkpointing=False,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
    )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Prompts are padded at the left, with a token that ends nothing."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def load_reward(folder: str) -> PreTrainedModel:
    """A model of one score; an adapter is merged into its base, so that TRL finds the backbone."""
    if not (Path(folder) / "adapter_config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        )
    base = json.loads((Path(folder) / "adapter_config.json").read_text())
    config = AutoConfig.from_pretrained(base["base_model_name_or_path"], num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(
        base["base_model_name_or_path"], config=config, dtype=torch.float32
    )
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return merged.requires_grad_(True)  # PEFT froze the base, and a value model must learn


def load_value(folder: str, low_rank: bool) -> PreTrainedModel:
    """The reward model once more, trained whole as in TRL's own script, or its head and LoRA."""
    model = load_reward(folder)
    if low_rank:  # in place: PolicyAndValueWrapper looks for the layers under their own names
        model = inject_adapter_in_model(lora("SEQ_CLS"), model)
        model.score.requires_grad_(True)
    return model


def lora(task: str) -> LoraConfig:
    """What `llmctl ppo --lora` trains."""
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type=task
    )


def load_prompts(file: Path, tokenizer: PreTrainedTokenizerBase, batch: int) -> Dataset:
    """The prompts as plain text; PPOTrainer wants them tokenized."""
    texts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    if len(texts) < batch:
        raise SystemExit(f"{file}: {len(texts)} prompts; with fewer than {batch} PPOTrainer hangs")
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})


if __name__ == "__main__":
    main()
