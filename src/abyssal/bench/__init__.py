"""A client that loads an OpenAI-compatible server, whoever wrote it, and measures what its users would feel."""
