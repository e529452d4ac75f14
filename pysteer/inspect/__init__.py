"""Packs side by side, and as figures."""
