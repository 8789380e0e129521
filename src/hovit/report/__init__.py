"""The report: tables, figures and claims, from records alone. Imports no torch."""
