"""Responses to prompts: generated, scored against their references and by a reward model."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.decode.loop import Prompt, Response, decode
from llmctl.evaluate.few_shot import SEPARATOR, FewShotFormat, FewShotPrompt
from llmctl.evaluate.perplexity import Window, window_nats
from llmctl.evaluate.prepare import EvaluatedModel, EvaluationPlan
from llmctl.evaluate.task import EvaluationTask, Row
from llmctl.models.loading import stop_tokens
from llmctl.reward.model import PromptResponse, RewardModel


def generation_task(
    config: EvaluateConfig,
    plan: EvaluationPlan,
    evaluated: EvaluatedModel,
    load: Callable[[], PreTrainedModel],
    load_reward: Callable[[], RewardModel],
) -> EvaluationTask:
    """The task of answering every prompt."""
    few_shot_format = evaluated.few_shot_format(config, plan.clock)

    def compute(units: range) -> list[Row]:
        prompts, model = [plan.prompts[number] for number in units], load()
        rows = [prompt.example.as_row() for prompt in prompts]
        if "perplexity" in plan.metrics:
            context, _ = evaluated.context_and_stride(config)
            costs = _reference_nats(few_shot_format, model, prompts, context)
            rows = [row | cost for row, cost in zip(rows, costs, strict=True)]
        if plan.generates:
            responses = _generate(config, evaluated, few_shot_format, model, prompts, units.start)
            for row, response in zip(rows, responses, strict=True):
                row |= {"response": response.text, "finish_reason": response.finish_reason}
                row |= plan.scorer.score(response.text, row["reference"] or "")
        if "reward" in plan.metrics:
            _add_rewards(load_reward(), prompts, rows)
        return rows

    return EvaluationTask(len(plan.prompts), config.batch_size, compute)


def _generate(
    config: EvaluateConfig,
    evaluated: EvaluatedModel,
    few_shot_format: FewShotFormat,
    model: PreTrainedModel,
    prompts: Sequence[FewShotPrompt],
    first: int,
) -> list[Response]:
    """A response to each prompt; the sampling stream is the prompt's number among all."""
    encoded = [
        Prompt(few_shot_format.encode_prompt(prompt), number)
        for number, prompt in enumerate(prompts, start=first)
    ]
    sampling = config
    if not few_shot_format.chat and prompts[0].shots and not config.stop:
        sampling = config.model_copy(update={"stop": [SEPARATOR]})
    responses = decode(
        model,
        encoded,
        sampling,
        eos=stop_tokens(model, evaluated.tokenizer, few_shot_format.end_of_answer),
        seed=config.seed,
        batch_size=config.batch_size,
        tokenizer=evaluated.tokenizer,
    )
    return sorted(responses, key=lambda response: response.index)


def _reference_nats(
    few_shot_format: FewShotFormat,
    model: PreTrainedModel,
    prompts: Sequence[FewShotPrompt],
    context: int,
) -> list[Row]:
    """Nats, tokens and bytes of each reference after its prompt, with the token that ends it.

    The prompt loses its beginning where both are too long.

    Raises:
        DataError: a reference does not fit by itself.
    """
    windows = []
    for prompt in prompts:
        encoded = few_shot_format.encode_with_reference(prompt)
        truncated = few_shot_format.truncate(encoded, context + 1)
        if truncated is None:
            text = f"the reference has more tokens than the context of {context:,}"
            raise prompt.example.error(text)
        windows.append(Window(tuple(truncated.tokens), truncated.trained.index(True)))
    return [
        {
            "nats": nats,
            "tokens": window.scored,
            "bytes": len((prompt.example.reference or "").encode()),
        }
        for prompt, window, nats in zip(prompts, windows, window_nats(model, windows), strict=True)
    ]


def _add_rewards(
    reward_model: RewardModel, prompts: Sequence[FewShotPrompt], rows: Sequence[dict[str, Any]]
) -> None:
    """Score the responses with a reward model, without the few-shot examples."""
    samples = []
    for prompt, row in zip(prompts, rows, strict=True):
        messages = list(prompt.example.messages)
        is_text = len(messages) == 1 and not reward_model.has_turns
        samples.append(
            PromptResponse(
                prompt.example.text if is_text else messages,
                row["response"],
                row["finish_reason"] != "length",
            )
        )
    for row, score in zip(rows, reward_model.score(samples).tolist(), strict=True):
        row["reward"] = score
