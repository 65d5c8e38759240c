"""Captions, pictures, their encoded form, and the DataModule that makes batches of latents of them."""
