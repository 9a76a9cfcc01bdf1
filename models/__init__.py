"""Hugging Face models as units: layers forward and backward, weights in and out, data."""
