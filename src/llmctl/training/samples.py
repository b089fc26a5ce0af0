"""Samples of a model while it trains: the same prompts, answered at every evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from llmctl.config.finetuning import Samples
from llmctl.config.sections import Sampling
from llmctl.console import log
from llmctl.data.chat.render import ChatFormat, encode_text
from llmctl.data.examples import Example
from llmctl.data.shards import TokenSplit
from llmctl.decode.forward import HuggingFaceForward
from llmctl.decode.loop import Prompt, decode, limit_new_tokens
from llmctl.errors import ModelError
from llmctl.models.patched_attention import CAUSAL
from llmctl.runs.directory import Run
from llmctl.runs.ownership import SAMPLES
from llmctl.training.distributed import is_sharded
from llmctl.training.state import evaluating, generators_kept

BEGINNING = 16
"""Tokens of a text that a model is given to continue."""
FAR = 4096
"""Tokens among which the beginning of a text is looked for."""
PromptTokens = tuple[str, list[int]]
"""A prompt as text and as tokens."""


class TextSampler:
    """Answers the same prompts into samples.jsonl."""

    def __init__(
        self,
        config: Samples,
        prompts: list[PromptTokens],
        tokenizer: PreTrainedTokenizerBase,
        model: Any,
        stops: list[int],
        run: Run,
        accelerator: Accelerator,
    ) -> None:
        """Take prompts, as `prompts_of` gives them; `stops` end an answer.

        A model that is sharded over processes answers none.
        """
        self.run, self.model, self.stops, self.tokenizer = run, model, stops, tokenizer
        self.sampling = Sampling(max_new_tokens=config.sample_tokens, temperature=0)
        usable = [] if is_sharded(accelerator) else prompts
        self.prompts = [
            (t, tokens) for t, tokens in usable if limit_new_tokens(tokens, model.config, 1) > 0
        ]

    def write(self, step: int) -> None:
        """Answer on the main process; greedy, so that only the model changes."""
        if not (self.run.is_main and self.prompts):
            return
        try:
            with evaluating(self.model), generators_kept(), _as_generating(self.model):
                self._answer(step)
        except ModelError as error:
            log.warning("no samples: %s", error.message)
            self.prompts = []

    def _answer(self, step: int) -> None:
        responses = decode(
            self.model,
            [Prompt(tokens, row) for row, (_, tokens) in enumerate(self.prompts)],
            self.sampling,
            eos=self.stops,
            forward=HuggingFaceForward(self.model),
            tokenizer=self.tokenizer,
        )
        for response in sorted(responses, key=lambda answer: answer.index):
            shown = {
                "prompt": self.prompts[response.index][0],
                "response": response.text,
                "finish_reason": response.finish_reason,
            }
            self.run.log({"step": step, **shown}, SAMPLES)


@contextmanager
def _as_generating(model: Any) -> Iterator[None]:
    """Attention that minds padding, and nothing compiled anew for the shapes of decoding."""
    attention = model.config._attn_implementation
    if attention == CAUSAL:
        model.set_attn_implementation("sdpa")
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:
        if attention == CAUSAL:
            model.set_attn_implementation(attention)


def sampled_tokens(config: Samples, prompt_tokens: float) -> float:
    """Most tokens that one evaluation's samples take, with prompts of so many tokens."""
    count = len(config.sample_prompt) or config.samples
    return count * (prompt_tokens + config.sample_tokens)


def beginnings(
    config: Samples, tokenizer: PreTrainedTokenizerBase, split: TokenSplit
) -> list[PromptTokens]:
    """Return the user's prompts, else beginnings of texts all over the split."""
    if config.sample_prompt:
        return [(text, encode_text(tokenizer, text)) for text in config.sample_prompt]
    eos, prompts = tokenizer.eos_token_id, []
    for number in range(config.samples):
        start = split.tokens * number // config.samples
        near = split.window(start, min(FAR, split.tokens - start))
        ends = np.flatnonzero(near[:-BEGINNING] == eos)
        tokens = near[ends[0] + 1 if len(ends) and start else 0 :][:BEGINNING].tolist()
        prompts.append((tokenizer.decode(tokens, skip_special_tokens=True), tokens))
    return list({text: (text, tokens) for text, tokens in prompts}.values())


def prompts_of(
    config: Samples,
    chat: ChatFormat,
    train: Sequence[Example],
    val: Sequence[Example],
) -> list[PromptTokens]:
    """Return the user's prompts, else the first ones of the validation data."""
    chats = any(example.messages is not None for example in train)
    if config.sample_prompt:
        if not chats:
            return [(text, encode_text(chat.tokenizer, text)) for text in config.sample_prompt]
        turns = [[{"role": "user", "content": text}] for text in config.sample_prompt]
        return [(t[-1]["content"], chat.encode_prompt(t)) for t in turns]
    prompts = []
    for example in val[: config.samples]:
        if example.messages is not None:
            last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
            before = list(example.messages[:last])
            if before:
                prompts.append(
                    (str(before[-1]["content"]), chat.encode_prompt(before, example.tools))
                )
    return prompts
