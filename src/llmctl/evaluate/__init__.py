"""Evaluation: data and a model in; rows with what each cost or scored, and figures over them, out.

`inputs.py` reads the data, `few_shot.py` writes prompts with examples, `prepare.py` checks all but
weights, `task.py` computes rows that a run can resume between, the `_task.py` files and
`perplexity.py` say how, `scorers.py` and `aggregate.py` score rows and sum them up, `compare.py`
compares two models, `benchmarks.py` runs lm-eval.
"""
