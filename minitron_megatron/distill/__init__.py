"""Stage `distill`: the frozen teacher and the pruned student in one job."""
