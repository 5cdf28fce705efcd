"""What comes in: list-wise preference data, tokens and chat templates, the token store."""
