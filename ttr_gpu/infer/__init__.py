"""What is done with a trained model: evaluation, beside the floors that it must beat."""
