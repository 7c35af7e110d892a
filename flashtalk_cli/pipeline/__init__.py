"""One session: conditions in, chunks of frames out, all state a value."""
