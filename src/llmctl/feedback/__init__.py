"""Rankings of responses by people.

In: prompts, a model that answers them (or the answers), and a person, on a page in the browser or
in the terminal. Out: a file of answers, a row of jsonl each, that `llmctl reward` reads.
"""
