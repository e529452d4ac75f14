"""Chat messages, and which tokens of a prompt are whose."""
