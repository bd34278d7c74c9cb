"""Runs and conversions as a page and as pictures; reads what they left and imports no torch."""
