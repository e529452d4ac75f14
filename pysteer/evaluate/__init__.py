"""Evaluation of steered models: answers, judges, figures, reports."""
