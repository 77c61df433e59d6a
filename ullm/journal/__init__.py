"""A journal of answers in an SQLite file, from which they go on after the end of the process."""
