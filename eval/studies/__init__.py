"""Studies behind choices of method: each is a module that measures on real weights and writes its own page."""
