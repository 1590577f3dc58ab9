"""One file a subject; see gpu/runs.py for the names of their functions."""
