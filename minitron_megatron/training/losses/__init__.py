"""Losses on the logits of teacher and student, over a vocabulary sharded by tensor parallelism."""
