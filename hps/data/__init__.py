"""What comes in: list-wise preference data, tokens, importers, generation and rewards."""
