"""Chat messages, their rendering, and the rule for the tokens of the user's message."""
