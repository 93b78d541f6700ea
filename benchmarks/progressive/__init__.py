"""Does progressive weighting help? Five weightings, several domains, clean and noisy positives."""
