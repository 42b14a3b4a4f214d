"""What is measured on the world: the report, the claims and their controls."""
