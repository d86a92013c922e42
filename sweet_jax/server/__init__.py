"""The HTTP server: the application, and the thread that computes predictions."""
