"""Calibration: a search over methods, layers, strengths and scopes, from prompts to a pack."""
