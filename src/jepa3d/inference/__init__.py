"""Uses of a trained encoder: embedding, search, scene features, labels, the viewer and export."""
