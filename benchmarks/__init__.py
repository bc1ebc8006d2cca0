"""Benchmarks of the loss and of the trainer against their peers."""
