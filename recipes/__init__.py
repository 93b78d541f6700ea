"""Whole parameter files, one per way of use; `peg recipe use NAME` copies one over params.yaml."""
