"""What a run leaves for people: tables, figures, a page, a model."""
