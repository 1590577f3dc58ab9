"""Stage `finetune`: the distilled student, trained on conversations."""
