"""Measuring: parameters and multiply-adds (`cost`), `latency`, and a whole table (`study`)."""
