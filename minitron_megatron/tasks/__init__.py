"""Downstream tasks of local files through lm-eval, for whichever stage asks a model."""
