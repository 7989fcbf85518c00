"""Models for programs that know nothing of this code: ONNX of compiled graphs, MindIR."""
