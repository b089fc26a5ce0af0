"""Evaluation: data and a model in, rows with what each cost or scored, and figures over them.

`inputs.py` reads, `few_shot.py` puts questions with examples before them, `task.py` cuts what is to
be done into parts that a run can continue from, `scorers.py` and `aggregate.py` score rows and sum
them up, `compare.py` sets two models side by side, `benchmarks.py` hands a model to lm-eval.
"""
