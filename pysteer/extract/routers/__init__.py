"""Fitting routers: `prompts` gathers the data, `fit` learns from activations."""
