"""Run directories: what goes in, how a run goes, what it leaves."""
