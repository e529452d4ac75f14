"""Gradient descent on directions: `learn` and what it is made of. All but `settings` needs torch."""
