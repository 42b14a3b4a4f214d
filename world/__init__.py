"""The default data: a small fictional world whose every fact is known."""
