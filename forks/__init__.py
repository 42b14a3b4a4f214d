"""Stages that were changed, one file each; README.md says how to write the next one."""
