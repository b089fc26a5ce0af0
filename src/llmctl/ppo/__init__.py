"""Proximal policy optimisation from rewards on texts: functions on tensors, and their loop."""
