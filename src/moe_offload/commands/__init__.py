"""What a person can start from a shell."""
