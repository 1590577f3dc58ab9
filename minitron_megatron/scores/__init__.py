"""The scores file and what is read out of it: written by the importance stage, read by prune, search and report."""
