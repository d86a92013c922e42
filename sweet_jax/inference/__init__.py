"""Inference with a saved model: its artifact, the engines that run it, and the scheduler."""

import os

# ONNX Runtime 1.29 and later otherwise sends usage data to its developers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
