"""Recipes: one YAML per compression, validated as a whole."""
