"""Scores of generated images, and the feature networks that they are measured on."""
