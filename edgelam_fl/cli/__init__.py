"""The command line: parses and prints; the work is done in the other packages."""
