"""`python -m llmctl`: what launchers run."""

from llmctl.cli import main

if __name__ == "__main__":
    main()
