"""Stage `correct`: the teacher, trained on the distillation data before it teaches."""
