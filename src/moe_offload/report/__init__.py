"""A run in numbers, files and figures."""
