"""The paper and the numbers in its text."""
