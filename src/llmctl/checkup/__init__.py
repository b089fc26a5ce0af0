"""What `llmctl doctor` looks at: functions from this machine to findings, each with its fix."""
