"""Measuring: parameters and multiply-adds (`cost`), latency (`latency`), a study's table (`study`)."""
