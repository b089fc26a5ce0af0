"""Answers to questions: written, scored against their references and by a reward model."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from llmctl.config.commands import EvaluateConfig
from llmctl.decode.loop import Prompt, Response, decode
from llmctl.errors import DataError
from llmctl.evaluate.few_shot import BETWEEN, FewShotPrompt, PromptFormat
from llmctl.evaluate.task import Row
from llmctl.evaluate.perplexity import Window, window_nats
from llmctl.evaluate.plan import EvaluationPlan, EvaluatedModel
from llmctl.evaluate.task import EvaluationTask
from llmctl.models.loading import stop_tokens
from llmctl.reward.model import Exchange, RewardModel


def generation_task(
    config: EvaluateConfig,
    plan: EvaluationPlan,
    subject: EvaluatedModel,
    load: Callable[[], PreTrainedModel],
    judge: Callable[[], RewardModel],
) -> EvaluationTask:
    """The work of asking a model every question."""
    asking = subject.asking(config, plan.clock)

    def compute(units: range) -> list[Row]:
        some, model = [plan.asked[number] for number in units], load()
        rows: list[dict[str, Any]] = [_asked(one) for one in some]
        if "perplexity" in plan.metrics:
            costs = _costs(config, subject, asking, model, some)
            rows = [row | cost for row, cost in zip(rows, costs, strict=True)]
        if plan.generates:
            written = _write(config, subject, asking, model, some, units.start)
            for row, response in zip(rows, written, strict=True):
                row |= {"response": response.text, "finish_reason": response.finish_reason}
                row |= plan.scorer.score(response.text, row["reference"] or "")
        if "reward" in plan.metrics:
            _reward(judge(), some, rows)
        return rows

    return EvaluationTask(len(plan.asked), config.batch_size, compute)


def _asked(one: FewShotPrompt) -> dict[str, Any]:
    question = one.question
    return {
        "place": question.place,
        "line": question.line,
        "prompt": question.text,
        "reference": question.reference,
    }


def _write(
    config: EvaluateConfig,
    subject: EvaluatedModel,
    asking: PromptFormat,
    model: PreTrainedModel,
    some: Sequence[FewShotPrompt],
    first: int,
) -> list[Response]:
    """A response to each question; its noise is that of its number."""
    prompts = [Prompt(asking.prompt(one), first + place) for place, one in enumerate(some)]
    sampling = config
    if not asking.chat and some[0].shots and not config.stop:
        sampling = config.model_copy(update={"stop": [BETWEEN]})
    responses = decode(
        model,
        prompts,
        sampling,
        eos=stop_tokens(model, subject.tokenizer),
        seed=config.seed,
        batch_size=config.batch_size,
        tokenizer=subject.tokenizer,
    )
    return sorted(responses, key=lambda response: response.index)


def _costs(
    config: EvaluateConfig,
    subject: EvaluatedModel,
    asking: PromptFormat,
    model: PreTrainedModel,
    some: Sequence[FewShotPrompt],
) -> list[dict[str, Any]]:
    """What each reference costs the model as a response, with the token that ends it."""
    context, _ = subject.window(config)
    windows = [_reply(asking, one, context) for one in some]
    return [
        {
            "nats": nats,
            "tokens": window.scored,
            "bytes": len((one.question.reference or "").encode()),
        }
        for one, window, nats in zip(some, windows, window_nats(model, windows), strict=True)
    ]


def _reply(asking: PromptFormat, one: FewShotPrompt, context: int) -> Window:
    """The reference after its prompt, which loses its beginning where both are too long.

    Raises:
        DataError: the reference does not fit by itself.
    """
    found = asking.shortened(asking.reply(one), context + 1)
    if found is None:
        raise DataError(
            f"the reference has more tokens than the context of {context:,}",
            file=one.question.place,
            line=one.question.line,
        )
    return Window(tuple(found.tokens), found.trained.index(True))


def _reward(judge: RewardModel, some: Sequence[FewShotPrompt], rows: Sequence[dict[str, Any]]) -> None:
    """Have a reward model score the responses, without the examples before the questions."""
    exchanges = []
    for one, row in zip(some, rows, strict=True):
        single = len(one.question.messages) == 1 and not judge.has_turns
        prompt: Any = one.question.text if single else list(one.question.messages)
        exchanges.append(Exchange(prompt, row["response"], row["finish_reason"] != "length"))
    for row, score in zip(rows, judge.score(exchanges).tolist(), strict=True):
        row["reward"] = score
