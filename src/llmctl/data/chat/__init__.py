"""Chat templates: choose one, render conversations, encode them."""
