"""What is kept: training states to resume from, and model directories for everybody."""
