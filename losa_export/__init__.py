"""Compress a language model to zeros and serve it from an ordinary CPU."""
