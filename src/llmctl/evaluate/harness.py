"""What lm-eval does to texts and examples, mended where its figures would be wrong.

In: requests to a model, and tasks. Out: the tokens that the model gets elsewhere in llmctl, and
examples of which none gives the answer away. Importing this imports lm-eval, which takes seconds.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmctl.decode.prompts import PromptEncoder
from llmctl.errors import DataError, ModelError
from llmctl.evaluate.perplexity import document_start, text_frame
from llmctl.models.loading import stop_tokens
from llmctl.numbers import counted

Doc = Mapping[str, Any]


class HarnessModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's model, which gives every text one beginning and no end.

    lm-eval puts a token before a text to predict, where a tokenizer may have put BOS already, and
    takes what a tokenizer puts after a text for a part of it. It does not know with which token
    the chat template ends a turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        templated: bool,
        batch_size: int,
        max_length: int | None,
    ) -> None:
        """Wrap a loaded model; `templated` prompts have the beginning that the template writes."""
        self._begin, _ = text_frame(tokenizer)
        self._templated = templated
        self._is_rolling = False
        end_of_answer = PromptEncoder(tokenizer, chat=templated).end_of_answer([])
        self._stops = stop_tokens(model, tokenizer, end_of_answer)
        self.cut = 0
        """Prompts that lost their beginning, being longer than the context."""
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            prefix_token_id=next(reversed(document_start(tokenizer)), None),
        )

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Encode a text: plain prompts with what the tokenizer puts before, and nothing after."""
        tokens = [
            int(token)
            for token in self.tokenizer.encode(
                string, add_special_tokens=False, split_special_tokens=self._is_rolling
            )
        ]
        is_bare = self._templated or self._is_rolling or add_special_tokens is False
        if not is_bare and tokens[: len(self._begin)] != self._begin:
            tokens = [*self._begin, *tokens]
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts as `tok_encode` does: ids and mask (B, T), padded at the left."""
        rows = [self.tok_encode(text) or [self.prefix_token_id] for text in strings]
        if left_truncate_len:
            self.cut += sum(len(row) > left_truncate_len for row in rows)
            rows = [row[-left_truncate_len:] for row in rows]
        length = max(map(len, rows))
        padding, pad = [length - len(row) for row in rows], int(self.tokenizer.pad_token_id)
        ids = [[pad] * count + row for count, row in zip(padding, rows, strict=True)]
        mask = [[0] * count + [1] * (length - count) for count in padding]
        return torch.tensor(ids), torch.tensor(mask)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Nats of whole texts, as `evaluate --data` frames them: one token before each, no end."""
        self._is_rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._is_rolling = False

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Nats of continuations.

        Raises:
            DataError: a continuation without tokens, or with more than the context.
        """
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"an answer of {len(continuation):,} tokens cannot be scored in a context of "
                    f"{self.max_length:,}: {text[1] if text else ''!r:.60}"
                )
            self.cut += len(context) + len(continuation) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Responses.

        Raises:
            ModelError: a response takes more than the whole context.
        """
        for request in requests:
            new = int(normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"])
            if new >= self.max_length:
                raise ModelError(
                    f"{request.task_name} generates {new:,} tokens, and the context of the model "
                    f"has {self.max_length:,}",
                    hint="set a smaller max_gen_toks in a copy of the task: --task-path",
                )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        """Continue prompts (B, T) up to where `generate` ends a response; padding stands there."""
        rows: Tensor = super()._model_generate(
            context, max_length, stop, **{**kwargs, "eos_token_id": self._stops or None}
        )
        new = rows[:, context.shape[1] :]
        is_over = torch.isin(new, torch.tensor(self._stops, device=new.device)).cumsum(1) > 0
        new[is_over] = int(self.tokenizer.pad_token_id)
        return rows


class OtherQuestions:
    """Draws a task's examples as its own sampler does, but none that asks what is asked.

    lm-eval leaves out the row itself where the task names the split of examples, and it is the one
    of the test; where a task has no other split, it draws from the rows that it asks.
    """

    def __init__(self, task: Any) -> None:
        """Take the place of the task's sampler."""
        self._task, self._sampler, self._write = task, task.sampler, task.fewshot_context
        self._questions: list[str] | None = None
        self._asked: Doc = {}
        task.sampler, task.fewshot_context = self, self._fewshot_context

    def set_rnd(self, seed: int | None) -> None:
        """See lm-eval's `ContextSampler.set_rnd`."""
        self._sampler.set_rnd(seed)

    def sample(self, n: int, eval_doc: Doc | None = None, **options: Any) -> Sequence[Doc]:
        """Draw n examples for the row whose prompt is being written.

        Raises:
            DataError: there are too few that ask something else.
        """
        asked = self._question(self._asked, None)
        try:
            shots: Sequence[Doc] = self._sampler.sample(n, eval_doc, **options)
        except (AssertionError, ValueError):  # lm-eval's, of fewer rows than it draws
            shots = []
        if shots and all(
            self._differs(shot, self._example_question(shot), asked) for shot in shots
        ):
            return shots
        pool: Sequence[Doc] = self._sampler.fewshot_docs()
        if self._questions is None:
            self._questions = [self._example_question(row) for row in pool]
        others = [
            row
            for row, question in zip(pool, self._questions, strict=True)
            if self._differs(row, question, asked)
        ]
        if len(others) < n:
            raise DataError(
                f"{self._task.task_name} is to show {counted(n, 'example')}, and has only "
                f"{counted(len(others), 'row that asks', 'rows that ask')} something else than the "
                "question",
                hint=f"show fewer: --shots {len(others)}",
            )
        rest = copy.copy(self._sampler)
        rest.replace_df(others)
        drawn: Sequence[Doc] = rest.sample(n)
        return drawn

    def _fewshot_context(self, doc: Doc, *args: Any, **kwargs: Any) -> Any:
        self._asked = doc
        return self._write(doc, *args, **kwargs)

    def _differs(self, example: Doc, question: str, asked: str) -> bool:
        return example != self._asked and question != asked

    def _example_question(self, example: Doc) -> str:
        return self._question(example, self._task.fewshot_cfg)

    def _question(self, doc: Doc, form: Any) -> str:
        """What a row asks: its text and its choices; of neither, its answer."""
        task = self._task
        text = task.doc_to_text(doc, form and form.doc_to_text)
        choices = None
        if task.config.doc_to_choice is not None:
            choices = task.doc_to_choice(doc, form and form.doc_to_choice)
        asks = ["" if isinstance(text, int) else text, choices]  # a number tells the right choice
        if not str(asks[0]).strip() and not choices:
            asks.append(task.doc_to_target(doc, form and form.doc_to_target))
        return repr(asks)
