"""Stage `evaluate`: teacher, pruned and distilled model side by side."""
