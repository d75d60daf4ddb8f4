"""Bytes of pictures and clips into patches."""
