"""What a model says while it learns: the same prompts, answered at every evaluation."""

from typing import Any

from llmctl.claim import SAMPLES
from llmctl.config.sections import Sampling
from llmctl.config.stages import SftConfig
from llmctl.console import log
from llmctl.data.supervised import SupervisedData
from llmctl.decode.forward import HuggingFaceForward
from llmctl.decode.loop import Prompt, decode, room
from llmctl.decode.prompts import encode_text
from llmctl.errors import ModelError
from llmctl.rundir import Run


class Sampler:
    """Answers the same prompts at every evaluation, into samples.jsonl."""

    def __init__(
        self, config: SftConfig, data: SupervisedData, model: Any, stops: list[int], run: Run
    ) -> None:
        """Choose and encode the prompts; `stops` end an answer."""
        self.run, self.model, self.stops, self.tokenizer = run, model, stops, data.tokenizer
        self.sampling = Sampling(max_new_tokens=config.sample_tokens, temperature=0)
        asks = asks_of(config, data)
        self.asks = [ask for ask in asks if room(ask[1], model.config, 1) > 0]

    def write(self, step: int) -> None:
        """Answer on the main process; greedy, so that only the model changes."""
        if not (self.run.is_main and self.asks):
            return
        try:
            self._answer(step)
        except ModelError as error:
            log.warning("no samples: %s", error.message)
            self.asks = []

    def _answer(self, step: int) -> None:
        responses = decode(
            self.model,
            [Prompt(tokens, row) for row, (_, tokens) in enumerate(self.asks)],
            self.sampling,
            eos=self.stops,
            forward=HuggingFaceForward(self.model),
            tokenizer=self.tokenizer,
        )
        for response in sorted(responses, key=lambda found: found.index):
            shown = {
                "prompt": self.asks[response.index][0],
                "response": response.text,
                "finish_reason": response.finish_reason,
            }
            self.run.log({"step": step, **shown}, SAMPLES)


def asks_of(config: SftConfig, data: SupervisedData) -> list[tuple[str, list[int]]]:
    """What is asked, as text and as tokens: what the user gave, else of the validation data."""
    chats = any(example.messages is not None for example in data.train_examples)
    if config.sample_prompt:
        if not chats:
            return [(text, encode_text(data.tokenizer, text)) for text in config.sample_prompt]
        turns = [[{"role": "user", "content": text}] for text in config.sample_prompt]
        return [(t[-1]["content"], data.format.prompt(t)) for t in turns]
    asks = []
    for example in data.val_examples[: config.samples]:
        if example.messages is not None:
            last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
            before = list(example.messages[:last])
            if before:
                asks.append((str(before[-1]["content"]), data.format.prompt(before, example.tools)))
    return asks
