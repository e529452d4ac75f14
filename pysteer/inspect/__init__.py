"""Comparison of packs, and pictures of them."""
