"""Building ONNX decoder graphs: formats of sparse weights, the graph itself, and its external data."""
