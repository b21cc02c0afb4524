"""Measurements of what the gate saves in arithmetic and time, and of what it costs in pictures."""
