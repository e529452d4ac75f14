"""Running a steered model: plans, the steering of each cached token, and `SteeredLlama`."""
