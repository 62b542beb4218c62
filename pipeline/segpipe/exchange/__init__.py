"""Models for other programs: ONNX, TorchScript, and packages of the BioImage Model Zoo."""
