"""CLIP's numbers of a pair, and the filter that takes the pairs by them (the paper, section 3.1.2)."""
