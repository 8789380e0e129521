"""Training: the loop, its state on disk (`checkpoint`), and what it starts from (`weights`)."""
