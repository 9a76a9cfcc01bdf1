"""The benchmark: the engine against baselines, its parts against what the machine can do."""
