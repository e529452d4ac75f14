"""Judge and measure what steered models write."""
