"""Training: the loop (`loop`), its state on disk (`checkpoint`), what it starts from (`weights`)."""
