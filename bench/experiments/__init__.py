"""Attempts that the package does not use: each with its check, its timing and, once measured, a verdict in NOTES.md."""
