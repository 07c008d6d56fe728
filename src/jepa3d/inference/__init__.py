"""Use a trained encoder: vectors, search, labels, predictions, scenes, the viewer and export."""
