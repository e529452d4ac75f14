"""Files that hold steering vectors; one module per format family."""
