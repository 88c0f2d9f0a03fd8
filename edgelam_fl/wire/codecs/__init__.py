"""Codecs, one file each: tensors to bytes and back."""
