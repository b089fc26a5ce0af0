"""Evaluation: data and a model in, rows with what each cost or scored, and figures over them.

`data.py` reads, `asking.py` puts questions with examples before them, `work.py` cuts what is to be
done into parts that a run can continue from, `metrics.py` and `figures.py` score rows and sum them
up, `comparing.py` sets two models side by side, `benchmarks.py` hands a model to lm-eval.
"""
