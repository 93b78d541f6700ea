"""Hard negatives: candidates of BM25 and dense search, and the choice among them."""
