"""Measuring: what each part costs, and what a machine can do live."""
