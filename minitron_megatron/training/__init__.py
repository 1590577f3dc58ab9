"""Training of a model against its teachers, or against text alone: the loop, the losses and what a run keeps on disk."""
