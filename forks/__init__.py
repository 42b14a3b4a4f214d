"""Stages that were changed, one file each; none yet."""
