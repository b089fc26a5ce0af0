"""What must never break: runs that are killed, starved, damaged and signalled."""
