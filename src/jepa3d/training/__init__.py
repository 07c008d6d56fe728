"""Training: from settings and data to a run folder."""
