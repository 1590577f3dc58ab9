"""What a finished run shows of itself: one source of rows for console, Markdown and the report."""
