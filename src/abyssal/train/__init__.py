"""The training framework: objective, step, balancing, evaluation, and the loop that holds them."""
