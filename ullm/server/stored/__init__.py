"""Answers that outlive their connection: kept in memory, and in a journal those that outlive the process."""
