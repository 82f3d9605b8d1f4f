"""What the short examples share: how they train, and their flags."""
