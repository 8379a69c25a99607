"""Bundled plugins; each is written as an outside package would write it."""
