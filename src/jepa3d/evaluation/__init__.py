"""What a representation is worth, under named protocols."""
