"""Encoders, exits and pretrained parameters."""
