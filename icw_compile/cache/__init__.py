"""The caller's side: the tensor that a cache layer holds, how it grows, and how compiled code takes it."""
