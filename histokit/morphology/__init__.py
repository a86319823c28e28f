"""What tiles of a class look like inside: clusters of features, and the words, captions and budgets that follow from them."""
