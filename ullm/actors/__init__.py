"""Long-lived things that talk in messages: mailboxes, workers, and the actors of the engine."""
