"""One HTML page with every claim, table, curve and record."""
