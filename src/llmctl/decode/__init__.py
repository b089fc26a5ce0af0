"""The token-by-token loop that generate, chat, evaluate and PPO rollouts share.

In go a model, prompts as token ids and sampling settings; out come responses, each as it finishes.
A text depends on its prompt, the seed and the id of its stream, never on what shares its batch.
"""
