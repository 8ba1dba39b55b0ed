"""Reading, naming, converting and writing weights. Import its modules; the package itself loads nothing."""
