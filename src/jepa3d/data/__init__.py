"""Read files and built-in shapes, and convert them to point clouds of one standard form."""
