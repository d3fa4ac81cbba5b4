"""How good and how fast an exported model is: parity, perplexity, statistics and benchmarks."""
