"""What an encoder is for: vectors, search, scenes, labels, a page to look at, other formats."""
