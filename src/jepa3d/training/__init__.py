"""Runs: the loop, checkpoints, settings in and a folder out."""
