"""Pages on runs: read what they left, choose what to show, draw it; no torch is loaded."""
