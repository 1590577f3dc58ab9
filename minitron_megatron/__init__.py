"""Minitron compression (arXiv 2407.14679, 2408.11796) as distributed jobs on Megatron-Core."""

__version__ = "0.1.0"
