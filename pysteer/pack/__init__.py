"""Steering vectors, routers and policies as data, and the pack that holds them."""
