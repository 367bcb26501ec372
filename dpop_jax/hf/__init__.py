"""Hugging Face model folders: read into our parameters, written from them."""
