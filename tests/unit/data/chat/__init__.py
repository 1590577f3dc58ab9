"""A package, so that its tests can import its conversations and templates."""
