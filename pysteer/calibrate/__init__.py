"""From prompts to a pack by itself: methods, layers, strengths and scopes are searched."""
