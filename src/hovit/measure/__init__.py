"""Measuring: parameters and multiply-adds (`cost`), `latency`, ONNX Runtime (`onnx_runtime`)."""
