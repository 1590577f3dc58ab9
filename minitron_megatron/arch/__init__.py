"""Shapes of models: closed forms, families as tables, Hugging Face configs."""
