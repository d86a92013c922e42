"""A saved model, its compiled programs, and how rows flow through them."""
