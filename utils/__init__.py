"""Flags and files: what any script needs. Knows nothing of language models."""
