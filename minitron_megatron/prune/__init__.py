"""Stage `prune`: scores + target architecture → plan → pruned checkpoint, streamed."""
