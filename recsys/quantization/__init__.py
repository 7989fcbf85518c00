"""int8 weights for serving (W8A16)."""
