"""The command line: one command a file; it parses, makes a configuration, and calls."""
