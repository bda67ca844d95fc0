"""What goes with an exported classifier: its model card and its ONNX graph."""
