"""A function per DVC stage."""
