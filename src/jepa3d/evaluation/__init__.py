"""Evaluation of representations under named protocols."""
