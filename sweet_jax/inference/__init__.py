"""Inference with a saved model: its artifact, the engines that run it, and the scheduler."""
