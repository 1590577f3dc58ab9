"""Architecture search (arXiv 2407.14679, section 2.4): enumerate, filter by budgets, train a shortlist shortly, keep the best."""
