"""Tell the forms in which others have rendered conversations to plain text.

In: a text. Out: where its last response begins, by the marks that well-known templates write.
"""

MARKS_OF_LINES = (
    *("### Response:", "### Assistant:", "ASSISTANT:", "Assistant:", "TL;DR:"),
    *("<|assistant|>", "<|im_start|>assistant", "<start_of_turn>model"),
)
"""What begins a line before a response: of Alpaca, Vicuna, hh-rlhf, ChatML, Gemma and others."""

MARKS_WITHIN_LINES = (
    *("[/INST]", " ASSISTANT:", "<|start_header_id|>assistant<|end_header_id|>"),
    *("<\uff5cAssistant\uff5c>", "<|CHATBOT_TOKEN|>", "<|assistant|>"),
)
"""The same within a line: of Llama 2, Mistral, Vicuna, Llama 3, DeepSeek and Command R."""

TURN_TOKENS = (
    *("<s>[INST]", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<|prompter|>"),
    *("<|start_of_role|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"),
)
"""Special tokens of templates that are not llmctl's."""

INSTRUCTION = ("[INST]", "[/INST]")
"""Around what the user says, in Llama 2's and Mistral's templates; in some vocabularies text."""


def prompt_of_text(text: str) -> str | None:
    """Return what stands before the last response of a text; None where no mark tells.

    With the mark, unless it begins a line that the response goes on.
    """
    within = [(text.rfind(mark), mark) for mark in MARKS_WITHIN_LINES]
    begins = [(text.rfind(f"\n{mark}"), f"\n{mark}") for mark in MARKS_OF_LINES]
    start, mark = max(within + begins, key=lambda found: found[0] + len(found[1]) * (found[0] >= 0))
    if start < 0:
        return None
    end = start + len(mark)
    is_own_line = not mark.startswith("\n") or text[end:].lstrip(" ")[:1] in ("\n", "")
    return text[: end if is_own_line else start]
