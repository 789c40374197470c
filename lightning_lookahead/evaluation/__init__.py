"""Measuring a module without disturbing its training."""
