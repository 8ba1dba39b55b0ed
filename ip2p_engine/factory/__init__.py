"""From captions to a data set of pairs: make, filter, go on, in one process or many."""
