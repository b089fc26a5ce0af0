"""Rows for tokens that a tokenizer has gained."""

from typing import Any

from transformers import PreTrainedTokenizerBase


def grow_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give every token of the tokenizer a row; a model that has more rows keeps them.

    New rows are drawn around the mean of the old ones with their covariance (Hewitt, 2021), so that
    no new token starts out likelier than all others. Random: seed before.
    """
    wanted = max(tokenizer.get_vocab().values()) + 1
    if wanted > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(wanted, mean_resizing=True)
