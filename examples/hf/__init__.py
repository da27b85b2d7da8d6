"""Directories of models as Hugging Face's libraries write and read them."""
