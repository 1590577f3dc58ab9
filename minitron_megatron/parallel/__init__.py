"""Process groups of a model, and collectives that take their group as an argument."""
