"""What is kept of a model: training states, model directories, GGUF files, and the way from one format to another."""
