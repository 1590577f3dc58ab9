"""What a recipe asks for against what the model, the layout and megatron-core can do."""
