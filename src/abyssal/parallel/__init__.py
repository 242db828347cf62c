"""One run on many ranks: layout, process groups, experts and state spread over them."""
