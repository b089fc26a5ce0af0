"""One module per command, and in it `run(config)`: load, build, fit, save."""
