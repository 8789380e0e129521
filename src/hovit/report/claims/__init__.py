"""Claims of the papers, checked by records."""
