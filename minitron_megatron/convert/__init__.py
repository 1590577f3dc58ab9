"""Stages `import` and `export`: Hugging Face ↔ torch_dist, streamed, bit-identical both ways."""
