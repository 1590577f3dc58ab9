"""Text in, batches out: tokenizers, indexed datasets, packed samples, evaluation windows."""
