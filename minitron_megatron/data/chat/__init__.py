"""Conversations in, tokens with a weight for each out: files, the tokenizer's template, its encoder, and the stage."""
