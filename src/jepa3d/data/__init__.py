"""Files and built-in shapes in, point clouds of one form out."""
