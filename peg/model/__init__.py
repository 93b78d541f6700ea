"""The encoder, the loss and the step that differentiates it."""
