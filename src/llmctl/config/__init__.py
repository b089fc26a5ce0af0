"""One frozen config class per command: the single source of flags, recipe keys and help."""
