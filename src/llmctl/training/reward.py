"""Reward modelling: preferences and any model in, a model that scores or an adapter out.

What a run leaves is loaded again before it counts: a score head that was not saved scores at
random, and nothing else would tell.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from trl.trainer.reward_config import RewardConfig as RewardArguments
from trl.trainer.utils import disable_dropout_in_model

from llmctl import hardware
from llmctl.adapters import save_adapter, weights_sha256
from llmctl.config.stages import RewardConfig
from llmctl.console import log
from llmctl.data.preferred import PreferenceData
from llmctl.data.tokenized import Encoded
from llmctl.embeddings import grow_embeddings
from llmctl.errors import ModelError, UserError
from llmctl.files import writing
from llmctl.headed import SCORE, load_classifier, require_padding_unseen, require_positions
from llmctl.merging import merge_model
from llmctl.models import local_folder, write_folder
from llmctl.quantized import HEADS
from llmctl.resume import earlier_manifest
from llmctl.rundir import Run, resolve_model
from llmctl.scoring import has_types, load_reward_model, score_encoded
from llmctl.training.adapters import adapt
from llmctl.training.base import Base
from llmctl.training.export import best_weights
from llmctl.training.guard import together
from llmctl.training.pairwise import PairBatches, pair_scores, preference_loss
from llmctl.training.placement import autocast, is_sharded
from llmctl.training.probe import agreed_batch, fitting_batch
from llmctl.training.reward_report import Scored, log_report, report
from llmctl.training.reward_trainer import PairTrainer
from llmctl.training.trl import Terms
from llmctl.training.tuned import announce, common_arguments, make_plan
from llmctl.training.tuning import TuningPlan, rhythm_of

EPOCHS = 1
"""More make a reward model learn its pairs by heart (Ouyang et al., 2022, appendix C.2)."""
CHECKED = 4
"""Pairs whose scores must be the same once the result is loaded again."""
TOLERANCE = 1e-3
"""Largest change of a score, relative to the largest one, that is rounding."""


@dataclass(frozen=True)
class Rewarding:
    """What is known once the model is loaded."""

    model: Any
    plan: TuningPlan
    train: PairBatches
    val: PairBatches | None
    parameters: int
    trained_parameters: int
    base: Base

    def facts(self, data: PreferenceData, device: str) -> dict[str, Any]:
        """What a manifest should say."""
        return {
            "inputs": [self.base.as_input(), *data.inputs],
            "device": hardware.device_name(device),
            "parameters": self.parameters,
            "plan": asdict(self.plan),
            "audit": data.facts(),
            "held_out": data.held_out,
        }


def prepare(
    config: RewardConfig, data: PreferenceData, accelerator: Accelerator, device: str
) -> Rewarding:
    """Load the model with a head that scores, fit it to the tokens, adapt it, make the plan.

    Raises:
        ModelError: a model that does not load, has several labels, or whose score padding changes.
        UserError: sizes or targets that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    if is_sharded(accelerator):
        raise UserError("FSDP is in force, and reward has not been made to work under it")
    set_seed(config.seed)
    loaded = load_classifier(config.model, SCORE)
    model: Any = loaded.model
    grow_embeddings(model, data.tokenizer)
    pad = model.config.get_text_config().pad_token_id = int(data.tokenizer.pad_token_id)
    disable_dropout_in_model(model)  # noise would tell two responses apart that are the same
    takes_types = has_types(model.config, data.written)
    train = PairBatches(data.train, pad, takes_types=takes_types)
    val = None if data.val is None else PairBatches(data.val, pad, takes_types=takes_types)
    require_positions(model, max(int(part.pairs.lengths.max()) for part in (train, val or train)))
    order = data.train.chosen.lengths.argsort()
    shortest, longest = (data.train.chosen.sequence(int(number))[0] for number in order[[0, -1]])
    require_padding_unseen(model.to(device), shortest.tolist(), longest.tolist(), pad)
    if config.has_adapter:
        added = set(data.tokenizer.convert_tokens_to_ids(list(data.added_tokens)))
        grown = range(data.embedding_rows, model.get_input_embeddings().weight.shape[0])
        new = sorted(loaded.new_modules - set(HEADS))
        tokens = sorted({*added, *grown})
        model = adapt(model, config, added_tokens=tokens, task="classify", new_modules=new)
    if not config.center_rewards:
        _hold_offset(model)
    plan, trained, parameters = make_plan(
        config, model, len(train), accelerator, device, epochs=EPOCHS
    )
    plan = _fitted(config, plan, model, train, accelerator, device)
    base = Base(config.model, weights_sha256(local_folder(resolve_model(config.model))))
    if accelerator.is_main_process:
        announce(plan, trained, parameters, "pairs")
    return Rewarding(model, plan, train, val, parameters, trained, base)


def _hold_offset(model: Any) -> None:
    """Freeze the bias of the head: no difference of scores depends on it.

    Its gradient is rounding, which Adam would blow up to steps of the learning rate.
    """
    for name, weight in model.named_parameters():
        if weight.shape == (1,) and name.endswith("bias"):
            weight.requires_grad_(False)


def _fitted(
    config: RewardConfig,
    plan: TuningPlan,
    model: Any,
    train: PairBatches,
    accelerator: Accelerator,
    device: str,
) -> TuningPlan:
    """The plan with a batch that fits, where that was asked for."""
    if not config.find_batch_size:
        return plan

    def loss_of(copied: Any, numbers: list[int]) -> Tensor:
        batch = {k: v.to(copied.device) for k, v in train.batch(numbers).items()}
        with autocast(plan, copied.device.type):
            return preference_loss(*pair_scores(copied, batch))

    size, passes = agreed_batch(
        lambda total: fitting_batch(
            model.to(device), loss_of, train.pairs.lengths.tolist(), total, config
        ),
        plan.batch_size,
        plan.grad_accum,
        known=earlier_manifest(config).get("plan"),
        accelerator=accelerator,
        device=device,
    )
    return replace(plan, batch_size=size, grad_accum=passes)


def build(config: RewardConfig, data: PreferenceData, found: Rewarding, run: Run) -> PairTrainer:
    """The trainer, ready to fit."""
    identity = {
        **found.plan.identity(),
        "data": data.train.digest(),
        "validation": None if data.val is None else data.val.digest(),
        "model": found.base.sha256,
        "max_length": data.max_length,
    }
    arguments = RewardArguments(
        **common_arguments(config, found.plan, hardware.pick_device(config.device)),
        max_length=None,
        disable_dropout=False,  # that of adapters stays
        center_rewards_coefficient=config.center_rewards or None,
    )
    terms = Terms(run, rhythm_of(config, found.plan), identity, config.group_by_length)
    return PairTrainer(
        found.model, data.tokenizer, found.train, found.val, found.plan, arguments, terms
    )


def export(
    config: RewardConfig, trainer: PairTrainer, found: Rewarding, data: PreferenceData
) -> dict[str, Any]:
    """Write the weights that validated best, the last where none did; load and judge them.

    Collective.

    Raises:
        ModelError: what was written scores otherwise than what was trained.
        ResourceError: the disk is full.
    """
    job = trainer.job
    state = best_weights(trainer, has_adapter=config.has_adapter)
    with together(job.accelerator), writing(job.run.path):
        if job.rank != 0:
            return {}
        # without the autocast that Accelerate puts around it
        model = job.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        texts = [
            text for n in range(min(CHECKED, len(found.train))) for text in found.train.texts(n)
        ]
        scores = score_encoded(
            model.float().eval(), texts, found.train.pad, found.train.takes_types
        )
        written = _write(config, model, state, found, data, job.run.path)
        for folder in (path for name, path in written.items() if name in ("model", "adapter")):
            _require_same(Path(folder), texts, scores, job.device)
        judged = _judge(Path(written["model"]), found, job.device)
        job.run.record(report=judged)
        shown = {
            "val_" + n: value for n, value in judged.items() if n not in ("reliability", "pairs")
        }
        return {**written, **shown}


def _write(
    config: RewardConfig,
    model: Any,
    state: dict[str, Tensor],
    found: Rewarding,
    data: PreferenceData,
    out: Path,
) -> dict[str, Any]:
    """The model, or the adapter and the model that it makes; where they are."""
    model.config.use_cache = True  # Trainer's switch for training, of no use to others
    folder, adapter = out / "model", out / "adapter"
    if not config.has_adapter:
        write_folder(model, state, data.tokenizer, folder)
        return {"model": str(folder)}
    save_adapter(
        model,
        data.tokenizer,
        adapter,
        base=found.base.reference,
        base_sha256=found.base.sha256,
        generation_config=None,
    )
    model.config.architectures = [type(model.get_base_model()).__name__]
    model.config.save_pretrained(adapter)  # nothing else says that it has one label
    if not config.merge:
        return {"model": str(adapter)}
    merged, difference = merge_model(model.to("cpu"))
    write_folder(merged, merged.state_dict(), data.tokenizer, folder)
    log.info("merged: scores differ from the adapter's by at most %.2g", difference)
    return {"model": str(folder), "adapter": str(adapter), "merge_difference": difference}


def _require_same(folder: Path, texts: list[Encoded], wanted: Tensor, device: str) -> None:
    """Refuse a result that does not score as the model did in training.

    Raises:
        ModelError: by how much it differs.
    """
    scores = load_reward_model(str(folder), device=device).score_encoded(texts)
    change = float((scores - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))
    if not change <= TOLERANCE:
        raise ModelError(
            f"loaded again, this model gives scores that differ by {change:.1%}", file=folder
        )


def _judge(folder: Path, found: Rewarding, device: str) -> dict[str, Any]:
    """The report on the validation pairs, scored by what was written; empty without any."""
    if found.val is None:
        log.warning("no pair was held out: nothing says how good this reward model is")
        return {}
    pairs = found.val.pairs
    lengths = [
        np.where(side.trained_counts, side.trained_counts, side.lengths).astype(np.float64)
        for side in (pairs.chosen, pairs.rejected)
    ]
    texts = [text for number in range(len(pairs)) for text in found.val.texts(number)]
    scores = load_reward_model(str(folder), device=device).score_encoded(texts).double().numpy()
    judged = report(
        Scored(
            scores[::2],
            scores[1::2],
            pairs.weights.astype(np.float64),
            *lengths,
        )
    )
    log_report(judged)
    return judged
