"""Check the claims of the papers against records."""
