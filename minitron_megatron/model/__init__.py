"""GPT models out of Architecture × Layout × Platform, and what runs them."""
