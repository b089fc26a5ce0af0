"""Tell the forms in which others have rendered conversations to plain text.

In: a text. Out: where its last response begins, and which special tokens it begins or ends with, by
the marks that well-known templates write.
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
    *("<s>[INST]", "[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "<<SYS>>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>", "<bos>", "<eos>", "<|im_sep|>"),
    *("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<EOS_TOKEN>"),
    *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("[gMASK]<sop>", "<|observation|>", "<|prompter|>", "<|end_of_turn|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    *("<|startoftext|>", "<|endoftext|>", "<|endofprompt|>"),
)
"""Special tokens that llmctl's templates do not write by name: of Mistral, Llama 3 and 4, Gemma,
Phi 4, DeepSeek, gpt-oss, Command R, GLM, OpenAssistant, OpenChat, Granite, EXAONE and GPT."""

BEGIN, END = "<s>", "</s>"
"""Tokens around a text, of Llama 2 and many others; in HTML around what is struck out."""

INSTRUCTION = ("[INST]", "[/INST]")
"""Around what the user says, in Llama 2's and Mistral's templates; in some vocabularies text."""


def frame_of(text: str) -> list[str]:
    """List those of `<s>` and `</s>` that a text begins and ends with.

    None where they also stand within it: then they strike words out, as in HTML.
    """
    inner = text.strip()
    if not (inner.startswith(BEGIN) or inner.endswith(END)):
        return []
    frame = [*([BEGIN] * inner.startswith(BEGIN)), *([END] * inner.endswith(END))]
    body = inner.removeprefix(BEGIN).removesuffix(END)
    return [] if BEGIN in body or END in body else frame


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
