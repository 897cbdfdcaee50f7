"""The math of a training step: tensors in, tensors out. Knows nothing of models, processes, files or settings."""
