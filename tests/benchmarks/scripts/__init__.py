"""Programs for other Pythons: each is run as a file, imports nothing of ullm, and is imported by nothing."""
