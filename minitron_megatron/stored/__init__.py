"""What a teacher thinks of each token, as it lies on disk."""
