"""Analyses of trained models, one file per kind."""
