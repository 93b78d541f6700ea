"""Metrics, significance, test sets and the report."""
