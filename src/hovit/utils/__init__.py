"""Errors, files, YAML, devices, code hashes: no other part of the package is needed here."""
