"""Reports on runs and conversions as an HTML page and PNGs, made from their files. Imports no torch."""
