"""Checkpoints: one table of tensors, streaming readers and writers of safetensors and torch_dist."""
