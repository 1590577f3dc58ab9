"""Stage `teacher-logits`: what a teacher thinks of each token, stored for distillations to come."""
