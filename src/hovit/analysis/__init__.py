"""Analyses of trained models: what a figure shows beside accuracy and latency."""
