"""What a run will take before anything is spent: parameters, memory, FLOPs, time, tokens."""
