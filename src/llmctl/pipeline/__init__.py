"""`llmctl run` and `demo`: a recipe of stages in, a run of each out, in one process."""
