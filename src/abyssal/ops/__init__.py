"""The operations of the model, one file each: the definition first, then faster versions behind the same signature."""
