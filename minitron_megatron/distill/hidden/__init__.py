"""Losses between hidden states of teacher and student, on any pipeline stage."""
