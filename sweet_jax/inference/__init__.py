"""Inference with a saved model: its artifact, the engines that run it, and the scheduler."""

import os

# Else ONNX Runtime, from 1.29 on, reports to its makers what it runs on, and how often.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
