"""Gradient descent on directions: `learn` and its parts. All but `settings` needs torch."""
