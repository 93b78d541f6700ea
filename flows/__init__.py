"""What runs when: the Prefect flow over DVC's stages, and the pages."""
