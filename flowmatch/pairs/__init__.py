"""Sets of noise/sample pairs: the store, and what fills and reads it."""
